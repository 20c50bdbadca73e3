from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.fleet.blame import FAILURES_IN_A_ROW
from raymem.fleet.ledger import (
    DEATHS_ALLOWED,
    LEASE_SECONDS,
    RESTARTS_WITHOUT_COMMIT,
    Ledger,
)
from raymem.store import Failure, TrialKey


def keys(n):
    return [TrialKey(math.inf, t) for t in range(n)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def ledger_with(n, workers, clock=None, **settings):
    ledger = Ledger(keys(n), clock=clock or Clock(), **settings)
    for rank in range(workers):
        ledger.register(f"w{rank}", "lane", rank)
    return ledger


def test_trials_are_leased_in_order_and_once():
    ledger = ledger_with(3, 2)
    assert [ledger.lease(w).key.trial for w in ("w0", "w1", "w0")][:2] == [0, 1]
    assert ledger.progress().running == 2


def test_a_worker_waits_while_others_may_still_fail_and_then_goes_home():
    ledger = ledger_with(1, 2)
    lease = ledger.lease("w0")
    waiting = ledger.lease("w1")
    assert waiting.key is None
    assert waiting.wait > 0
    assert not ledger.progress().complete
    ledger.finish("w0", lease.key, "committed")
    assert ledger.lease("w0") is None
    assert ledger.lease("w1") is None
    assert ledger.progress().complete


def test_a_dead_workers_trial_is_trained_again_with_the_same_seeds():
    ledger = ledger_with(2, 2)
    first = ledger.lease("w0")
    ledger.register("w0 again", "lane", 0)
    assert ledger.lease("w0") is None  # the dead one's ghost
    leases = [ledger.lease("w0 again")]
    assert leases[0].key.trial == 1
    ledger.finish("w0 again", leases[0].key, "committed")
    again = ledger.lease("w0 again")
    assert (again.key, again.attempt, again.seed_attempt) == (first.key, 1, 1)
    assert ledger.progress().deaths == 1


def test_a_trial_that_kills_its_worker_is_found_and_its_neighbours_are_not_blamed():
    """Trial 3 kills its whole lane of four workers, each time."""
    ledger = Ledger(keys(12), clock=Clock())
    for generation in range(20):
        names = [f"g{generation}r{rank}" for rank in range(4)]
        for rank, name in enumerate(names):
            ledger.register(name, "lane", rank)
        alive = True
        while alive and not ledger.progress().complete:
            leases = [(name, ledger.lease(name)) for name in names]
            work = [(name, lease.key) for name, lease in leases if lease and lease.key]
            if any(key.trial == 3 for _, key in work):
                alive = False
            else:
                for name, key in work:
                    ledger.finish(name, key, "committed")
        if alive:
            break
    progress = ledger.progress()
    assert (progress.committed, progress.failed) == (11, 1)
    (lost,) = ledger.take_lost()
    assert (lost.key.trial, lost.cause) == (3, "worker-died")
    assert str(DEATHS_ALLOWED) in lost.message
    assert ledger.take_lost() == []


def test_a_lost_lane_gives_its_trials_back_without_blame():
    ledger = ledger_with(4, 2)
    ledger.register("other", "lane-2", 0)
    for worker in ("w0", "w1", "other"):
        ledger.lease(worker)
    for _ in range(DEATHS_ALLOWED + 1):
        ledger.release_lane("lane")
        ledger.register("w0", "lane", 0)
    progress = ledger.progress()
    assert (progress.deaths, progress.failed, progress.running) == (0, 0, 1)
    rest = []
    while (lease := ledger.lease("other")) is not None and lease.key:
        rest.append(lease.key.trial)
        ledger.finish("other", lease.key, "committed")
    assert sorted(rest) == [0, 1, 3]


def test_a_lease_without_heartbeats_runs_out_and_a_late_commit_still_counts(clock):
    ledger = ledger_with(1, 2, clock)
    lease = ledger.lease("w0")
    clock.now += LEASE_SECONDS - 1
    ledger.beat("w0")
    clock.now += LEASE_SECONDS - 1
    assert ledger.lease("w1").key is None
    clock.now += 2
    assert ledger.lease("w1").key == lease.key
    ledger.finish("w0", lease.key, "committed")
    assert ledger.progress().committed == 1
    ledger.finish("w1", lease.key, "duplicate")
    assert ledger.progress().committed == 1
    assert ledger.progress().complete
    assert ledger.lease("w0") is None


def test_a_late_failure_does_not_count(clock):
    ledger = ledger_with(2, 2, clock)
    lease = ledger.lease("w0")
    clock.now += LEASE_SECONDS + 1
    taken = ledger.lease("w1")
    ledger.finish("w0", lease.key, "diverged", "late")
    ledger.finish("w1", taken.key, "committed")
    again = ledger.lease("w1")
    assert again.key == lease.key
    assert (again.attempt, again.seed_attempt) == (1, 1)
    assert ledger.progress().failed == 0


def test_divergence_is_tried_with_the_same_seed_then_with_a_new_one_then_given_up():
    ledger = ledger_with(1, 1)
    seen = []
    while (lease := ledger.lease("w0")) is not None:
        seen.append((lease.attempt, lease.seed_attempt))
        ledger.finish("w0", lease.key, "diverged", "nan")
    assert seen == [(1, 1), (2, 1), (3, 2)]
    assert ledger.progress().failed == 1
    assert ledger.take_lost() == []  # the workers recorded each


def test_recorded_divergences_are_remembered_and_other_failures_are_tried_again():
    def failed(trial, causes):
        return [
            Failure(key=TrialKey(math.inf, trial), attempt=n + 1, cause=cause)
            for n, cause in enumerate(causes)
        ]

    past = failed(0, ["diverged"] * 3) + failed(1, ["out-of-memory"] * 5) + failed(2, ["diverged"])
    ledger = Ledger(keys(3), failures=past, done_before=7)
    ledger.register("w", "lane", 0)
    leases = [ledger.lease("w")]
    ledger.finish("w", leases[0].key, "committed")
    leases.append(ledger.lease("w"))
    assert [(x.key.trial, x.attempt, x.seed_attempt) for x in leases] == [(1, 6, 1), (2, 2, 1)]
    progress = ledger.progress()
    assert (progress.total, progress.done, progress.failed) == (10, 8, 1)


def test_an_error_before_the_first_commit_is_the_users_and_ends_the_fleet():
    ledger = ledger_with(5, 1)
    lease = ledger.lease("w0")
    ledger.finish("w0", lease.key, "error", "ZeroDivisionError in model.py:3")
    progress = ledger.progress()
    assert progress.complete
    assert progress.fatal == "ZeroDivisionError in model.py:3"
    assert ledger.lease("w0") is None


def test_an_error_after_commits_is_tried_again_and_then_given_up():
    ledger = ledger_with(2, 1)
    ledger.finish("w0", ledger.lease("w0").key, "committed")
    for _ in range(3):
        ledger.finish("w0", ledger.lease("w0").key, "error", "flaky")
    assert ledger.lease("w0") is None
    assert [(lost.cause, lost.attempt) for lost in ledger.take_lost()] == [("error", 3)]
    assert ledger.progress().fatal is None


def test_when_everything_fails_the_fleet_ends():
    ledger = ledger_with(100, 1)
    for _ in range(FAILURES_IN_A_ROW):
        ledger.finish("w0", ledger.lease("w0").key, "diverged", "loss is nan")
    assert "loss is nan" in ledger.progress().fatal


@pytest.mark.parametrize("outcome", ["full", "mismatch"])
def test_a_full_store_or_a_mismatch_ends_the_fleet_and_running_trials_finish(outcome):
    ledger = ledger_with(5, 2)
    first, second = ledger.lease("w0"), ledger.lease("w1")
    ledger.finish("w0", first.key, outcome, "why")
    assert ledger.lease("w0") is None
    assert not ledger.progress().complete
    ledger.finish("w1", second.key, "committed")
    progress = ledger.progress()
    assert (progress.complete, progress.fatal, progress.fatal_kind) == (True, "why", outcome)


def test_stopping_lets_running_trials_finish():
    ledger = ledger_with(5, 1)
    lease = ledger.lease("w0")
    ledger.stop()
    assert ledger.lease("w0") is None
    assert not ledger.progress().complete
    ledger.finish("w0", lease.key, "committed")
    assert ledger.progress().complete


def test_when_all_nodes_are_about_to_go_running_trials_are_saved_and_no_new_one_begins():
    ledger = ledger_with(5, 2)
    lease = ledger.lease("w0")
    assert not ledger.beat("w0")
    ledger.preempt()
    assert ledger.beat("w0")
    assert ledger.lease("w1") is None
    ledger.finish("w0", lease.key, "committed")
    assert ledger.progress().complete


def test_a_lane_that_only_restarts_is_broken_and_another_is_not():
    ledger = ledger_with(50, 2)
    ledger.register("good", "lane-2", 0)
    for n in range(RESTARTS_WITHOUT_COMMIT):
        assert not ledger.is_broken("lane")
        for rank in range(2):
            ledger.register(f"n{n}r{rank}", "lane", rank)
    assert ledger.is_broken("lane")
    assert ledger.lease(f"n{n}r0") is None
    assert ledger.lease("good").key is not None


def test_rate_and_time_left(clock):
    ledger = ledger_with(11, 1, clock)
    for _ in range(6):
        key = ledger.lease("w0").key
        clock.now += 2
        ledger.finish("w0", key, "committed")
    progress = ledger.progress()
    assert progress.rate == pytest.approx(0.5)
    assert progress.seconds_left == pytest.approx(10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), lanes=st.integers(1, 4))
def test_whatever_happens_every_trial_is_committed_once(seed, n, lanes):
    """Deaths, lost lanes, late finishes and expired leases at random; no poison trials."""
    draw, clock = random.Random(seed), Clock()
    ledger = Ledger(keys(n), clock=clock)
    born, workers, committed = 0, {}, []

    def start(lane, rank):
        nonlocal born
        born += 1
        name = f"w{born}"
        workers[name] = (lane, rank, None)
        ledger.register(name, lane, rank)

    for lane in range(lanes):
        for rank in range(2):
            start(f"lane{lane}", rank)
    for _ in range(5000):
        if ledger.progress().complete:
            break
        name = draw.choice(sorted(workers))
        lane, rank, key = workers[name]
        event = draw.random()
        clock.now += draw.choice([0, 1, 1, LEASE_SECONDS / 3])
        if event < 0.04 and n > 2:  # the lane's node is lost; a new lane comes
            ledger.release_lane(lane)
            for other in [w for w, (its, _, _) in workers.items() if its == lane]:
                del workers[other]
            for new in range(2):
                start(f"{lane}'", new)
        elif key is None:
            lease = ledger.lease(name)
            if lease is not None:
                workers[name] = (lane, rank, lease.key)
        elif event < 0.8:
            if key not in committed:
                committed.append(key)
                ledger.finish(name, key, "committed")
            else:
                ledger.finish(name, key, "duplicate")
            workers[name] = (lane, rank, None)
    progress = ledger.progress()
    assert progress.complete
    assert progress.committed == n == len(committed)
    assert (progress.failed, progress.fatal, progress.running) == (0, None, 0)


def test_a_late_commit_of_the_last_trial_ends_the_fleet_also_if_nobody_is_left_to_ask():
    ledger = ledger_with(1, 1)
    lease = ledger.lease("w0")
    ledger.release_lane("lane")
    assert not ledger.progress().complete
    ledger.finish("w0", lease.key, "committed")
    progress = ledger.progress()
    assert (progress.complete, progress.committed) == (True, 1)


def test_many_idle_workers_ask_less_often():
    ledger = ledger_with(1, 1000)
    ledger.lease("w0")
    assert ledger.lease("w1").wait * 200 >= 1000
    few = ledger_with(1, 2)
    few.lease("w0")
    assert few.lease("w1").wait < 1
