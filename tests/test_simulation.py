"""The trial queue under everything that dies, in simulated time; a wrong trial queue would be
seen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import Scenario, Simulation, Violation
from raymem.fleet.trial_queue import TrialQueue


def simulate(queue=TrialQueue, **settings):
    simulation = Simulation(Scenario(name="test", **settings), queue)
    simulation.run()
    return simulation.report()


EVERYTHING = {
    "workers": 12,
    "worker_group": 3,
    "trials": 30,
    "node_hours": 2.0,
    "crash_hours": 40.0,
    "diverging": 0.2,
    "poison": 1,
    "silent": 0.2,
    "orphans": 0.3,
    "checkpoint_minutes": 10,
    "notice": True,
    "driver_kills": (0.7, 1.5),
}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_everything_at_once_each_trial_is_done_or_given_up_for_a_reason(seed):
    report = simulate(seed=seed, **EVERYTHING)
    # One trial kills its worker, and one of the six that diverge always does; an orphan may have
    # done them all the same.
    assert report["done"] + report["given_up"] == 30
    assert report["given_up"] - report["innocent"] <= 2
    assert report["innocent"] <= 1
    assert report["fatal"] is None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_fleet_ends_also_if_its_last_trial_is_committed_after_its_worker_group_was_given_up(seed):
    report = simulate(workers=4, worker_group=2, trials=6, node_hours=0.7, orphans=1.0, seed=seed)
    assert report["done"] == 6


def test_without_faults_nothing_is_lost_and_workers_are_busy():
    report = simulate(workers=16, worker_group=4, trials=160, spread=0.1)
    assert report["lost_share"] == pytest.approx(0, abs=1e-9)
    assert report["ideal_hours"] == pytest.approx(160 * 0.5 / 16, rel=0.05)
    assert 1 < report["hours"] / report["ideal_hours"] < 1.15


@pytest.mark.slow
def test_checkpoints_keep_what_lost_nodes_had_done():
    spot = {"workers": 16, "worker_group": 4, "trials": 64, "hours": 1.0, "node_hours": 2.0}
    whole = simulate(**spot)["lost_share"]
    kept = simulate(checkpoint_minutes=10, **spot)["lost_share"]
    noticed = simulate(checkpoint_minutes=10, notice=True, **spot)["lost_share"]
    # A loss costs half a trial on average, or half of ten minutes: 1/6 of it.
    assert whole > 0.1
    assert kept < whole / 2
    assert noticed < kept / 4


def test_idle_workers_do_not_keep_the_queue_busy():
    """All but one of 400 workers wait for the last trial: 200 calls a second, heartbeats and
    polls."""
    report = simulate(workers=400, worker_group=8, trials=401, spread=0.0, hours=0.05)
    assert report["calls_a_second"] < 300


BAD_NODE = {"workers": 64, "worker_group": 8, "trials": 320, "hours": 0.1}


def test_a_bad_node_of_eight_costs_its_share_of_the_fleet():
    report, without = simulate(bad_nodes=1, **BAD_NODE), simulate(**BAD_NODE)
    assert (report["done"], report["given_up"], report["fatal"]) == (320, 0, None)
    assert report["nodes_retired"] == 1
    assert 4 <= report["workers_retired"] <= 8
    # 56 workers do the work of 64, in six waves in place of five.
    assert 1.0 < report["hours"] / without["hours"] < 6 / 5 + 0.1
    # Each failure took a second.
    assert report["lost_share"] < 1e-3


def test_a_bad_worker_of_eight_is_retired_with_its_node():
    report = simulate(workers=8, worker_group=1, trials=80, bad_nodes=1)
    assert (report["done"], report["given_up"], report["fatal"]) == (80, 0, None)
    assert (report["workers_retired"], report["nodes_retired"]) == (2, 1)


def test_a_bad_device_is_retired_and_its_node_goes_on():
    report = simulate(bad_devices=3, **BAD_NODE)
    assert (report["done"], report["given_up"], report["fatal"]) == (320, 0, None)
    assert (report["workers_retired"], report["nodes_retired"]) == (3, 0)


def test_most_nodes_bad_end_the_fleet_at_once():
    report = simulate(bad_nodes=5, **BAD_NODE)
    assert (report["done"], report["fatal"]) == (0, "as simulated")
    assert report["hours"] * 3600 < 60


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), bad_nodes=st.integers(0, 2), bad_devices=st.integers(0, 4))
def test_bad_nodes_among_all_other_faults_make_no_trial_be_given_up(seed, bad_nodes, bad_devices):
    """Up to two nodes of eight, and single workers of others; nodes and workers die as well."""
    faults = {**EVERYTHING, "workers": 24, "poison": 0, "crash_hours": math.inf, "driver_kills": ()}
    report = simulate(seed=seed, bad_nodes=bad_nodes, bad_devices=bad_devices, **faults)
    assert report["fatal"] is None
    assert report["innocent"] == 0


class LeasesTwice(TrialQueue):
    def _next(self, *how):
        key = super()._next(*how)
        if key is not None:
            self._pending.append(key)
        return key


class BlamesNodes(TrialQueue):
    def release_worker_group(self, worker_group):
        self._remove(worker_group, None, "worker-died")


class Forgets(TrialQueue):
    def release_worker_group(self, worker_group):
        for name, worker in list(self._workers.items()):
            if worker.worker_group == worker_group:
                del self._workers[name]


class DoesNotDrain(TrialQueue):
    def drain(self, worker_group):
        """As if nothing had been said."""


class CountsTwice(TrialQueue):
    def _commit(self, key, outcome, worker):
        super()._commit(key, outcome, worker)
        self._done_before += 1


@pytest.mark.parametrize("wrong", [LeasesTwice, BlamesNodes, Forgets, DoesNotDrain, CountsTwice])
def test_a_wrong_queue_is_seen(wrong):
    with pytest.raises(Violation):
        simulate(
            wrong, workers=8, worker_group=2, trials=40, node_hours=0.5, hours=0.1, notice=True
        )


def test_a_queue_that_never_ends_is_seen():
    class Waits(TrialQueue):
        def progress(self):
            progress = super().progress()
            return type(progress)(**{**vars(progress), "complete": False})

    with pytest.raises(Violation, match="does not end"):
        simulate(Waits, workers=4, worker_group=2, trials=8)


def test_time_is_that_of_the_longest_of_one_wave():
    report = simulate(workers=8, worker_group=8, trials=8, spread=0.5)
    longest = max(Simulation(Scenario(name="", workers=8, trials=8, spread=0.5)).length.values())
    assert report["hours"] * 3600 == pytest.approx(longest + 20, abs=1)
    assert not math.isnan(report["lost_share"])
