from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.fleet.blame import FAILURES_IN_A_ROW
from raymem.fleet.trial_queue import (
    DEATHS_ALLOWED,
    LEASE_SECONDS,
    RESTARTS_WITHOUT_COMMIT,
    TrialQueue,
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


def queue_with(n, workers, clock=None, **settings):
    queue = TrialQueue(keys(n), clock=clock or Clock(), **settings)
    for rank in range(workers):
        queue.register(f"w{rank}", "group", rank)
    return queue


def test_trials_are_leased_in_order_and_once():
    queue = queue_with(3, 2)
    assert [queue.lease(w).key.trial for w in ("w0", "w1", "w0")][:2] == [0, 1]
    assert queue.progress().running == 2


def test_a_worker_waits_while_others_may_still_fail_and_then_goes_home():
    queue = queue_with(1, 2)
    lease = queue.lease("w0")
    waiting = queue.lease("w1")
    assert waiting.key is None
    assert waiting.wait > 0
    assert not queue.progress().complete
    queue.finish("w0", lease.key, "committed")
    assert queue.lease("w0") is None
    assert queue.lease("w1") is None
    assert queue.progress().complete


def test_a_dead_workers_trial_is_trained_again_with_the_same_seeds():
    queue = queue_with(2, 2)
    first = queue.lease("w0")
    queue.register("w0 again", "group", 0)
    assert queue.lease("w0") is None  # the dead one's ghost
    leases = [queue.lease("w0 again")]
    assert leases[0].key.trial == 1
    queue.finish("w0 again", leases[0].key, "committed")
    again = queue.lease("w0 again")
    assert (again.key, again.attempt, again.seed_attempt) == (first.key, 1, 1)
    assert queue.progress().deaths == 1


def test_a_trial_that_kills_its_worker_is_found_and_its_neighbours_are_not_blamed():
    """Trial 3 kills its whole worker group of four workers, each time."""
    queue = TrialQueue(keys(12), clock=Clock())
    for generation in range(20):
        names = [f"g{generation}r{rank}" for rank in range(4)]
        for rank, name in enumerate(names):
            queue.register(name, "group", rank)
        alive = True
        while alive and not queue.progress().complete:
            leases = [(name, queue.lease(name)) for name in names]
            work = [(name, lease.key) for name, lease in leases if lease and lease.key]
            if any(key.trial == 3 for _, key in work):
                alive = False
            else:
                for name, key in work:
                    queue.finish(name, key, "committed")
        if alive:
            break
    progress = queue.progress()
    assert (progress.committed, progress.failed) == (11, 1)
    (lost,) = queue.take_lost()
    assert (lost.key.trial, lost.cause) == (3, "worker-died")
    assert str(DEATHS_ALLOWED) in lost.message
    assert queue.take_lost() == []


def test_a_lost_worker_group_gives_its_trials_back_without_blame():
    queue = queue_with(4, 2)
    queue.register("other", "group-2", 0)
    for worker in ("w0", "w1", "other"):
        queue.lease(worker)
    for _ in range(DEATHS_ALLOWED + 1):
        queue.release_worker_group("group")
        queue.register("w0", "group", 0)
    progress = queue.progress()
    assert (progress.deaths, progress.failed, progress.running) == (0, 0, 1)
    rest = []
    while (lease := queue.lease("other")) is not None and lease.key:
        rest.append(lease.key.trial)
        queue.finish("other", lease.key, "committed")
    assert sorted(rest) == [0, 1, 3]


def test_a_lease_without_heartbeats_runs_out_and_a_late_commit_still_counts(clock):
    queue = queue_with(1, 2, clock)
    lease = queue.lease("w0")
    clock.now += LEASE_SECONDS - 1
    queue.heartbeat("w0")
    clock.now += LEASE_SECONDS - 1
    assert queue.lease("w1").key is None
    clock.now += 2
    assert queue.lease("w1").key == lease.key
    queue.finish("w0", lease.key, "committed")
    assert queue.progress().committed == 1
    queue.finish("w1", lease.key, "duplicate")
    assert queue.progress().committed == 1
    assert queue.progress().complete
    assert queue.lease("w0") is None


def test_a_late_failure_does_not_count(clock):
    queue = queue_with(2, 2, clock)
    lease = queue.lease("w0")
    clock.now += LEASE_SECONDS + 1
    taken = queue.lease("w1")
    queue.finish("w0", lease.key, "diverged", "late")
    queue.finish("w1", taken.key, "committed")
    again = queue.lease("w1")
    assert again.key == lease.key
    assert (again.attempt, again.seed_attempt) == (1, 1)
    assert queue.progress().failed == 0


def test_divergence_is_tried_with_the_same_seed_then_with_a_new_one_then_given_up():
    queue = queue_with(1, 1)
    seen = []
    while (lease := queue.lease("w0")) is not None:
        seen.append((lease.attempt, lease.seed_attempt))
        queue.finish("w0", lease.key, "diverged", "nan")
    assert seen == [(1, 1), (2, 1), (3, 2)]
    assert queue.progress().failed == 1
    assert queue.take_lost() == []  # the workers recorded each


def test_recorded_divergences_are_remembered_and_other_failures_are_tried_again():
    def failed(trial, causes):
        return [
            Failure(key=TrialKey(math.inf, trial), attempt=n + 1, cause=cause)
            for n, cause in enumerate(causes)
        ]

    past = failed(0, ["diverged"] * 3) + failed(1, ["out-of-memory"] * 5) + failed(2, ["diverged"])
    queue = TrialQueue(keys(3), failures=past, done_before=7)
    queue.register("w", "group", 0)
    leases = [queue.lease("w")]
    queue.finish("w", leases[0].key, "committed")
    leases.append(queue.lease("w"))
    assert [(x.key.trial, x.attempt, x.seed_attempt) for x in leases] == [(1, 6, 1), (2, 2, 1)]
    progress = queue.progress()
    assert (progress.total, progress.done, progress.failed) == (10, 8, 1)


def test_an_error_before_the_first_commit_is_the_users_and_ends_the_fleet():
    queue = queue_with(5, 1)
    lease = queue.lease("w0")
    queue.finish("w0", lease.key, "error", "ZeroDivisionError in model.py:3")
    progress = queue.progress()
    assert progress.complete
    assert progress.fatal == "ZeroDivisionError in model.py:3"
    assert queue.lease("w0") is None


def test_an_error_after_commits_is_tried_again_and_then_given_up():
    queue = queue_with(2, 1)
    queue.finish("w0", queue.lease("w0").key, "committed")
    for _ in range(3):
        queue.finish("w0", queue.lease("w0").key, "error", "flaky")
    assert queue.lease("w0") is None
    assert [(lost.cause, lost.attempt) for lost in queue.take_lost()] == [("error", 3)]
    assert queue.progress().fatal is None


def test_when_everything_fails_the_fleet_ends():
    queue = queue_with(100, 1)
    for _ in range(FAILURES_IN_A_ROW):
        queue.finish("w0", queue.lease("w0").key, "diverged", "loss is nan")
    assert "loss is nan" in queue.progress().fatal


@pytest.mark.parametrize("outcome", ["full", "mismatch"])
def test_a_full_store_or_a_mismatch_ends_the_fleet_and_running_trials_finish(outcome):
    queue = queue_with(5, 2)
    first, second = queue.lease("w0"), queue.lease("w1")
    queue.finish("w0", first.key, outcome, "why")
    assert queue.lease("w0") is None
    assert not queue.progress().complete
    queue.finish("w1", second.key, "committed")
    progress = queue.progress()
    assert (progress.complete, progress.fatal, progress.fatal_kind) == (True, "why", outcome)


def test_stopping_lets_running_trials_finish():
    queue = queue_with(5, 1)
    lease = queue.lease("w0")
    queue.stop()
    assert queue.lease("w0") is None
    assert not queue.progress().complete
    queue.finish("w0", lease.key, "committed")
    assert queue.progress().complete


def test_when_all_nodes_are_about_to_go_running_trials_are_saved_and_no_new_one_begins():
    queue = queue_with(5, 2)
    lease = queue.lease("w0")
    assert not queue.heartbeat("w0")
    queue.preempt()
    assert queue.heartbeat("w0")
    assert queue.lease("w1") is None
    queue.finish("w0", lease.key, "committed")
    assert queue.progress().complete


def test_a_worker_group_that_only_restarts_is_broken_and_another_is_not():
    queue = queue_with(50, 2)
    queue.register("good", "group-2", 0)
    for n in range(RESTARTS_WITHOUT_COMMIT):
        assert not queue.is_broken("group")
        for rank in range(2):
            queue.register(f"n{n}r{rank}", "group", rank)
    assert queue.is_broken("group")
    assert queue.lease(f"n{n}r0") is None
    assert queue.lease("good").key is not None


def test_rate_and_time_left(clock):
    queue = queue_with(11, 1, clock)
    for _ in range(6):
        key = queue.lease("w0").key
        clock.now += 2
        queue.finish("w0", key, "committed")
    progress = queue.progress()
    assert progress.rate == pytest.approx(0.5)
    assert progress.seconds_left == pytest.approx(10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), worker_groups=st.integers(1, 4))
def test_whatever_happens_every_trial_is_committed_once(seed, n, worker_groups):
    """Deaths, lost worker groups, late finishes and expired leases at random; no poison trials."""
    draw, clock = random.Random(seed), Clock()
    queue = TrialQueue(keys(n), clock=clock)
    born, workers, committed = 0, {}, []

    def start(worker_group, rank):
        nonlocal born
        born += 1
        name = f"w{born}"
        workers[name] = (worker_group, rank, None)
        queue.register(name, worker_group, rank)

    for worker_group in range(worker_groups):
        for rank in range(2):
            start(f"worker group{worker_group}", rank)
    for _ in range(5000):
        if queue.progress().complete:
            break
        name = draw.choice(sorted(workers))
        worker_group, rank, key = workers[name]
        event = draw.random()
        clock.now += draw.choice([0, 1, 1, LEASE_SECONDS / 3])
        if event < 0.04 and n > 2:  # the worker group's node is lost; a new worker group comes
            queue.release_worker_group(worker_group)
            for other in [w for w, (its, _, _) in workers.items() if its == worker_group]:
                del workers[other]
            for new in range(2):
                start(f"{worker_group}'", new)
        elif key is None:
            lease = queue.lease(name)
            if lease is not None:
                workers[name] = (worker_group, rank, lease.key)
        elif event < 0.8:
            if key not in committed:
                committed.append(key)
                queue.finish(name, key, "committed")
            else:
                queue.finish(name, key, "duplicate")
            workers[name] = (worker_group, rank, None)
    progress = queue.progress()
    assert progress.complete
    assert progress.committed == n == len(committed)
    assert (progress.failed, progress.fatal, progress.running) == (0, None, 0)


def test_a_late_commit_of_the_last_trial_ends_the_fleet_also_if_nobody_is_left_to_ask():
    queue = queue_with(1, 1)
    lease = queue.lease("w0")
    queue.release_worker_group("group")
    assert not queue.progress().complete
    queue.finish("w0", lease.key, "committed")
    progress = queue.progress()
    assert (progress.complete, progress.committed) == (True, 1)


def test_many_idle_workers_ask_less_often():
    queue = queue_with(1, 1000)
    queue.lease("w0")
    assert queue.lease("w1").wait * 200 >= 1000
    few = queue_with(1, 2)
    few.lease("w0")
    assert few.lease("w1").wait < 1
