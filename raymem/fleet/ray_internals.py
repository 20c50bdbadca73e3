"""All that raymem uses of Ray and that Ray does not document. Tried with Ray 2.60.0.

| what                                                | without it                                |
|-----------------------------------------------------|-------------------------------------------|
| the head node's resource, `node:__internal_head__`  | actors that must not be lost may land on  |
|                                                     | any node                                  |
| the list of draining nodes                          | checkpoints of a lost node are older      |
| the table of placement groups with their selectors  | dead groups hold nodes until the driver   |
|                                                     | ends                                      |
| Ray Train's callbacks and scaling policy            | each worker group has a cleaner actor of  |
|                                                     | 140 MB, and asks the autoscaler           |
|                                                     | (AutoscalingCoordinator) for its own node |
| the address that this cleaner asks, in              | it ends groups of the wrong cluster       |
| `RAY_API_SERVER_ADDRESS`                            |                                           |

tests/test_upgrades.py has a test for each, which says what moved. `make test-latest` runs it
against the newest versions that pyproject.toml admits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy

HEAD_RESOURCE = "node:__internal_head__"

try:
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback as Cleaner,
    )
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class GroupTrainer(TorchTrainer):  # type: ignore[misc]
        """Ray Train for a worker group that the driver cleans up after.

        Ray's own cleaner is an actor of 140 MB for each group, which asks the newest Ray of the
        machine, not its own, whether the controller lives, and which outlives the driver.
        """

        def _create_default_callbacks(self) -> list[object]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, Cleaner)]

        def _initialize_and_run_controller(self, **options: object) -> object:
            options["scaling_policy"] = silent_policy(self.scaling_config)
            return super()._initialize_and_run_controller(**options)

    # A cleaner that is not there needs no answer.
    RUNNER_ENVIRONMENT: dict[str, str] = {}
except ImportError:
    PlacementGroupTableData = None
    GroupTrainer = TorchTrainer  # type: ignore[misc]
    # Where nobody listens: a cleaner without an answer leaves its group alone.
    RUNNER_ENVIRONMENT = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}


def silent_policy(config: ScalingConfig) -> ScalingPolicy:
    """Ray Train's scaling policy, without its requests to an autoscaler.

    What a group holds is in use, and its nodes stay for that. The requests outlive the group by
    three minutes. They name its node, and while that is lost, Ray's second autoscaler brings
    nothing to anybody who asks in the same way.
    """

    # A class in a function is sent by value: the controller need not import this package.
    class Silent(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: object) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Silent(config)


def draining_nodes() -> set[str]:
    """The ids of nodes that are about to go: preempted, or scaled down. Raises what Ray does."""
    return set(_state().get_draining_nodes())


def marked_placement_groups(label: str) -> Iterator[tuple[str, bytes]]:
    """Selector and id of each placement group that has a selector of `label` and is not removed.

    Raises AttributeError or TypeError where Ray does not say.
    """
    # The public table, ray.util.placement_group_table(), has no selectors and tells not whose.
    rows = _state()._connect_and_get_accessor().get_placement_group_table()
    for row in map(PlacementGroupTableData.FromString, rows):
        selector = row.bundles[0].label_selector.get(label) if row.bundles else None
        if selector and row.state != row.REMOVED:
            yield selector, row.placement_group_id


def _state() -> Any:
    return ray._private.state.state
