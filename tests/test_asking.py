"""What a fleet and `raymem ingest` ask for, given to the schedulers of both of Ray's autoscalers.

The clusters are those of the files that ship. What is asked for is read back from a real Ray.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest

ray = pytest.importorskip("ray")

from schedulers import (  # noqa: E402
    FILES,
    SCHEDULERS,
    Node,
    chosen_by_kuberay,
    configuration,
    demands,
    tasks,
)

from raymem.fleet.cluster import CPU_NODE, connected  # noqa: E402
from raymem.fleet.demand import AHEAD, Demand  # noqa: E402
from raymem.fleet.placement import Placements  # noqa: E402

pytestmark = pytest.mark.alone
GPU_NODES, CPU_NODES = 32, 4
WORKER = {"CPU": 1.0, "GPU": 1.0}
EACH = [(file, version) for file in FILES for version in SCHEDULERS]


@pytest.fixture(scope="module")
def head():
    """A head without CPUs, as those of the cluster files."""
    with connected(num_cpus=0):
        yield ray.nodes()[0]["NodeID"]


@functools.cache
def cluster(file):
    return configuration(file)


def gpu_kind(file) -> str:
    kinds = cluster(file)["available_node_types"]
    return next(name for name, kind in kinds.items() if kind["resources"].get("GPU"))


def nodes_at_work(file, n) -> list[Node]:
    """`n` GPU nodes, each with one worker."""
    return [Node(kind=gpu_kind(file), used=WORKER, id=f"{i:056x}") for i in range(1, n + 1)]


@pytest.mark.parametrize("wanted", [1, 32, 33, 100, 1990])
def test_as_many_nodes_come_as_are_wanted_and_may_come(head, wanted):
    demand = Demand(WORKER)
    demand.ask(wanted, known=[head])
    seen = demands()
    demand.ask(0, known=[head])
    for file, version in EACH:
        started = SCHEDULERS[version](cluster(file), seen, [])
        assert started == {gpu_kind(file): min(wanted, GPU_NODES)}, (file, version)
    assert not demands().state.pending_gang_resource_requests


def test_of_a_full_cluster_little_is_asked(head):
    """And nothing comes."""
    demand, nodes = Demand(WORKER), nodes_at_work("aws", GPU_NODES)
    demand.ask(1990 - 32, known=[head, *(node.id for node in nodes)], at_work=32)
    seen = demands()
    demand.ask(0, known=[])
    assert len(seen.state.pending_gang_resource_requests) == AHEAD
    for file, version in EACH:
        nodes = nodes_at_work(file, GPU_NODES)
        assert not +SCHEDULERS[version](cluster(file), seen, nodes), (file, version)


def test_a_lost_node_is_replaced_by_one(head):
    """Also while the group that was on it is still waiting for it to come back."""
    demand, placements = Demand(WORKER), Placements()
    others = [node.id for node in nodes_at_work("aws", GPU_NODES)[1:]]
    dead = ray.util.placement_group(
        [WORKER], bundle_label_selector=[placements.selector("group-000", "d" * 56)]
    )
    demand.ask(1990 - 31, known=[head, *others], at_work=31)
    seen = demands()
    demand.ask(0, known=[])
    ray.util.remove_placement_group(dead)
    for file, version in EACH:
        nodes = nodes_at_work(file, GPU_NODES)[1:]
        assert SCHEDULERS[version](cluster(file), seen, nodes) == {gpu_kind(file): 1}


def test_a_node_that_has_just_come_is_not_asked_for_again(head):
    """Its group takes a while to start. The second autoscaler is told that it is taken."""
    demand = Demand(WORKER)
    new = Node(kind=gpu_kind("aws"), id="a" * 56)
    demand.ask(4, known=[head])
    demand.ask(3, known=[head, new.id], at_work=1)
    seen = demands()
    demand.ask(0, known=[])
    assert SCHEDULERS["v2"](cluster("aws"), seen, [new]) == {new.kind: 3}
    # The first does not know of labels: one node less, until the group holds this one.
    assert SCHEDULERS["v1"](cluster("aws"), seen, [new]) == {new.kind: 2}


def test_workers_share_nodes(head):
    """Four to a GPU; and without GPUs, no GPU node comes while CPU nodes have room."""
    for bundle, wanted, expected in [
        ({"CPU": 1.0, "GPU": 0.25}, 30, {"gpu_spot": 8}),
        ({"CPU": 4.0}, 16, {"cpu_spot": 4}),
    ]:
        demand = Demand(bundle)
        demand.ask(wanted, known=[head])
        seen = demands()
        demand.ask(0, known=[])
        for version in SCHEDULERS:
            assert SCHEDULERS[version](cluster("aws"), seen, []) == expected


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1, 31, 33, 1990])
@pytest.mark.parametrize(("file", "version"), EACH)
def test_a_fleet_grows_to_what_the_cluster_holds_and_no_further(head, file, version, wanted):
    demand, nodes, before = Demand(WORKER), [], -1
    while before < len(nodes):
        before = len(nodes)
        known = [head, *(node.id for node in nodes)]
        demand.ask(wanted - len(nodes), known=known, at_work=len(nodes))
        started = +SCHEDULERS[version](cluster(file), demands(), nodes)
        assert set(started) <= {gpu_kind(file)}
        nodes = nodes_at_work(file, len(nodes) + started[gpu_kind(file)])
    demand.ask(0, known=[])
    assert len(nodes) == min(wanted, GPU_NODES)


def test_kuberay_takes_the_second_autoscaler():
    assert chosen_by_kuberay() == "v2"


def test_decoding_starts_no_gpu_node():
    for file, version in EACH:
        schedule = SCHEDULERS[version]
        kinds = cluster(file)["available_node_types"]
        cpu_kind = next(n for n, kind in kinds.items() if n.startswith("cpu"))
        # What was asked for without it: this is why.
        bare = schedule(cluster(file), tasks({"CPU": 1.0}, 128), [])
        assert bare[gpu_kind(file)] > 0
        for n in (1, 64, 128, 2000):
            started = schedule(cluster(file), tasks({"CPU": 1.0, CPU_NODE: 0.001}, n), [])
            most = -(-n // int(kinds[cpu_kind]["resources"]["CPU"]))
            assert started == Counter({cpu_kind: min(most, CPU_NODES)}), (file, version, n)
