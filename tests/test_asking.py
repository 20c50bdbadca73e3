"""What a fleet asks for, given to the schedulers of both of Ray's autoscalers."""

from __future__ import annotations

import pytest

ray = pytest.importorskip("ray")

from schedulers import FILES, SCHEDULERS, Node, chosen_by_kuberay, configuration, demands  # noqa: E402

from raymem.fleet.cluster import connected  # noqa: E402
from raymem.fleet.demand import Demand  # noqa: E402

pytestmark = pytest.mark.alone
GPU_NODES = 32
WORKER = {"CPU": 1.0, "GPU": 1.0}


@pytest.fixture(scope="module", autouse=True)
def head():
    """A head without CPUs, as those of the cluster files."""
    with connected(num_cpus=0):
        yield


def gpu_kind(config) -> str:
    kinds = config["available_node_types"]
    return next(name for name, kind in kinds.items() if kind["resources"].get("GPU"))


def growth(config, schedule, wanted: int) -> list[int]:
    """How many nodes there are round after round, each with a worker as soon as it is there."""
    kind, demand, nodes, sizes = gpu_kind(config), Demand(WORKER), [], []
    try:
        while not sizes or sizes[-1] < len(nodes):
            sizes.append(len(nodes))
            known = [node.id for node in nodes] + [node["NodeID"] for node in ray.nodes()]
            demand.ask(wanted - len(nodes), known=known, at_work=len(nodes))
            started = schedule(config, demands(), nodes)
            assert set(started) <= {kind}, started
            more = range(len(nodes), len(nodes) + started[kind])
            nodes += [Node(kind=kind, used=WORKER, id=f"{i:056x}") for i in more]
    finally:
        demand.ask(0, known=[])
    return [*sizes, len(nodes)]


@pytest.mark.parametrize("wanted", [1, 31, 32, 33, 100, 1990])
@pytest.mark.parametrize("version", SCHEDULERS)
@pytest.mark.parametrize("cluster", FILES)
def test_what_is_wanted_comes_as_far_as_the_cluster_goes(cluster, version, wanted):
    sizes = growth(configuration(cluster), SCHEDULERS[version], wanted)
    assert sizes[1] == min(wanted, GPU_NODES)  # at once
    assert sizes[-1] == min(wanted, GPU_NODES)  # and no more later


def test_kuberay_takes_the_second_autoscaler():
    assert chosen_by_kuberay() == "v2"
