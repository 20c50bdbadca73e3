"""What worker groups hold of a Ray cluster: how it is told whose it is, and given back at once.

A worker group's CPUs and GPUs are a placement group that Ray Train's controller makes. When that
controller dies with its runner or its node, Ray frees them only when the driver ends; of a lost
node, it asks the autoscaler for another one until then. So the driver removes them, knowing them by
a mark in their label selectors.

All that has no public door in Ray is here, as tried with Ray 2.60. Without it, fleets run as Ray
Train runs by itself: what dead groups held is free when the driver ends.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raymem.fleet.demand import NODE_LABEL

# A selector that every node meets: none has such a label.
MARK = "raymem/group"
# A killed controller may be starting its group again.
QUIET_SECONDS, LONGEST_SECONDS, POLL_SECONDS = 1.0, 10.0, 0.1

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

        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, Cleaner)]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            options["scaling_policy"] = _silent_policy(self.scaling_config)
            return super()._initialize_and_run_controller(**options)

    # A cleaner that is not there needs no answer.
    RUNNER_ENVIRONMENT: dict[str, str] = {}
except ImportError:
    PlacementGroupTableData = None
    GroupTrainer = TorchTrainer  # type: ignore[misc]
    # Where nobody listens: a cleaner without an answer leaves its group alone.
    RUNNER_ENVIRONMENT = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}


def _silent_policy(config: ScalingConfig) -> Any:
    """Ray Train's scaling policy, without its requests to an autoscaler.

    What a group holds is in use, and its nodes stay for that. The requests outlive the group by
    three minutes. They name its node, and while that is lost, Ray's second autoscaler brings
    nothing to anybody who asks in the same way.
    """

    # A class in a function is sent by value: the controller need not import this package.
    class Silent(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Silent(config)


class Placements:
    """What the worker groups of one fleet hold."""

    def __init__(self) -> None:
        self._fleet = uuid.uuid4().hex
        self._living: set[str] = set()
        self._sweep_until = 0.0

    def selector(self, group: str, node_id: str) -> dict[str, str]:
        """The label selector of a worker group on a node, or with "" on any."""
        mark = {MARK: f"!in({self._fleet}.{group})"}
        return {**mark, NODE_LABEL: node_id} if node_id else mark

    def free(self, living: Collection[str]) -> int:
        """Remove the placement groups of worker groups that are not `living`; how many there were.

        To be called now and then: it looks for a while after a worker group has ended.
        """
        now = time.monotonic()
        if self._living.difference(living):
            self._sweep_until = now + LONGEST_SECONDS
        self._living = set(living)
        if now > self._sweep_until:
            return 0
        dead = [held for group, held in self._held() if group not in self._living]
        for group in dead:
            remove_placement_group(group)
        return len(dead)

    def close(self) -> None:
        """Remove all, and wait until no more come."""
        end = time.monotonic() + LONGEST_SECONDS
        quiet_from = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < min(end, quiet_from):
            if self.free(()):
                quiet_from = time.monotonic() + QUIET_SECONDS
            time.sleep(POLL_SECONDS)

    def _held(self) -> list[tuple[str, PlacementGroup]]:
        """The placement groups of this fleet that are not removed, and the worker groups' names."""
        start = f"!in({self._fleet}."
        held = []
        for mark, group_id in _marked():
            if mark.startswith(start):
                group = PlacementGroup(ray.PlacementGroupID(group_id))
                held.append((mark.removeprefix(start).removesuffix(")"), group))
        return held


def _marked() -> Iterator[tuple[str, bytes]]:
    """The marks and ids of all placement groups that have a mark and are not removed."""
    # The public table, ray.util.placement_group_table(), has no selectors and tells not whose.
    try:
        rows = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
        for row in map(PlacementGroupTableData.FromString, rows):
            mark = row.bundles[0].label_selector.get(MARK) if row.bundles else None
            if mark and row.state != row.REMOVED:
                yield mark, row.placement_group_id
    except AttributeError:  # a later Ray: they are free when the driver ends
        return
