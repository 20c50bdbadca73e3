"""What raymem uses of Ray and opacus beyond their documents: says what moved in a newer version.

One test for each entry of raymem.fleet.ray_internals and raymem.privacy.opacus_internals.
`make test-latest` runs this against the newest versions that pyproject.toml admits.
"""

from __future__ import annotations

import math

import opacus
import pytest
from processes import wait_until

from raymem.privacy import opacus_internals

ray = pytest.importorskip("ray")

from ray.train import ScalingConfig  # noqa: E402

from raymem.fleet import ray_internals  # noqa: E402
from raymem.fleet.cluster import connected  # noqa: E402

RAY, OPACUS = f"Ray {ray.__version__}", f"opacus {opacus.__version__}"
CURE = "read its table, and follow Ray there"


@pytest.fixture(scope="module")
def cluster():
    with connected(num_cpus=1):
        yield


@pytest.mark.alone
def test_the_head_node_has_its_resource(cluster):
    named = [ray_internals.HEAD_RESOURCE in node["Resources"] for node in ray.nodes()]
    assert any(named), f"{RAY} names its head otherwise: change ray_internals.HEAD_RESOURCE"


@pytest.mark.alone
def test_ray_lists_draining_nodes(cluster):
    try:
        found = ray_internals.draining_nodes()
    except Exception as error:
        pytest.fail(f"{RAY} moved the list of draining nodes ({error}): see ray_internals; {CURE}")
    assert found == set()


@pytest.mark.alone
def test_ray_tells_whose_a_placement_group_is(cluster):
    selector = {"raymem/upgrade": "!in(mine)"}
    group = ray.util.placement_group([{"CPU": 1}], bundle_label_selector=[selector])

    def marked():
        return list(ray_internals.marked_placement_groups("raymem/upgrade"))

    try:
        wait_until(lambda: marked() == [("!in(mine)", group.id.binary())], 20)
    except Exception as error:
        pytest.fail(f"{RAY} moved the selectors of placement groups ({error!r}); {CURE}")
    finally:
        ray.util.remove_placement_group(group)
    wait_until(lambda: marked() == [], 20)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_train_lets_us_clean_up_and_ask_for_nodes():
    """Without these, groups that die hold their nodes, and ask the autoscaler for them."""
    moved = f"{RAY} moved Ray Train's callbacks or its scaling policy: see ray_internals; {CURE}"
    assert ray_internals.GroupTrainer.__module__ == "raymem.fleet.ray_internals", moved
    trainer = ray_internals.GroupTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    made = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert "BackendSetupCallback" in made, moved
    assert "PlacementGroupCleanerCallback" not in made, moved
    policy = ray_internals.silent_policy(trainer.scaling_config)
    # Sent by value: Ray Train's controller does not import this package.
    assert "<locals>" in type(policy).__qualname__
    for name in ("after_controller_start", "_maybe_send_resource_request"):
        assert callable(getattr(ray_internals.FixedScalingPolicy, name, None)), moved


def test_the_cleaner_asks_the_address_that_we_take_from_it():
    from ray._private import ray_constants

    name = getattr(ray_constants, "RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE", None)
    assert name == "RAY_API_SERVER_ADDRESS", (
        f"{RAY} renamed the variable with the address of its API: change RUNNER_ENVIRONMENT in "
        "ray_internals, for Rays without PlacementGroupCleanerCallback"
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_opacus_has_the_privacy_loss():
    try:
        loss = opacus_internals.privacy_loss(2.0, 1.0, 1, eps_error=0.001, delta_error=1e-6)
    except AttributeError as error:
        pytest.fail(f"{OPACUS} moved the PRV accountant's loss ({error}): see opacus_internals")
    # Of one Gaussian step, delta at epsilon 0 is 2 Phi(1 / (2 sigma)) - 1.
    expected = math.erf(1 / (4 * math.sqrt(2)))
    assert loss.compute_delta_estimate(0.0) == pytest.approx(expected, abs=2e-3)
