"""One bad GPU, node or trial does not end a fleet; a study that cannot work ends it at once."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raymem.fleet import blame as rules
from raymem.fleet.blame import Blame, Location, Need, Place
from raymem.fleet.trial_queue import TrialQueue
from raymem.store import TrialKey

ECC = "CUDA error: uncorrectable ECC error encountered"


def key(trial):
    return TrialKey(math.inf, trial)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def fleet(trials, worker_groups, workers=1):
    """A trial queue with worker groups of so many workers, each on a node of its own, named
    GROUP/RANK."""
    queue = TrialQueue([key(t) for t in range(trials)], clock=Clock())
    names = [
        f"n{worker_group}/{rank}"
        for worker_group in range(worker_groups)
        for rank in range(workers)
    ]
    for name in names:
        worker_group, rank = name.split("/")
        queue.register(
            name,
            worker_group,
            int(rank),
            Location(node=worker_group, host=worker_group, slot=f"GPU {rank}"),
        )
    return queue, names


def run(queue, names, outcome_of, rounds=10_000):
    """Let workers work in turn; `outcome_of(name, trial, n)` says what becomes of their n-th trial.

    Returns, by trial, how often it was committed.
    """
    committed, tried, home = {}, dict.fromkeys(names, 0), set()
    for _ in range(rounds):
        if queue.progress().complete or len(home) == len(names):
            break
        for name in names:
            lease = None if name in home else queue.lease(name)
            if lease is None:
                home.add(name)
            elif lease.key is not None:
                outcome = outcome_of(name, lease.key.trial, tried[name])
                tried[name] += 1
                if outcome == "committed":
                    committed[lease.key.trial] = committed.get(lease.key.trial, 0) + 1
                message = f"{outcome} of {name}"
                queue.finish(name, lease.key, outcome, message)
    return committed


# The three faults


def test_one_workers_error_before_the_first_commit_does_not_end_a_fleet_of_64():
    queue, names = fleet(200, 8, 8)
    leases = {name: queue.lease(name).key for name in names}
    queue.finish("n3/5", leases["n3/5"], "error", ECC)
    progress = queue.progress()
    assert progress.fatal is None
    assert not progress.complete


def test_twenty_failures_in_a_row_of_one_worker_do_not_end_a_fleet():
    queue, names = fleet(200, 8, 8)
    for name in names:
        queue.finish(name, queue.lease(name).key, "committed")
    leases = {name: queue.lease(name).key for name in names}
    queue.finish("n3/5", leases["n3/5"], "out-of-memory", "out of memory")
    for _ in range(25):
        lease = queue.lease("n3/5")
        if lease is not None and lease.key is not None:
            queue.finish("n3/5", lease.key, "out-of-memory", "out of memory")
    assert queue.progress().fatal is None


def test_a_node_that_cannot_reach_the_store_does_not_end_a_fleet():
    queue, names = fleet(200, 8, 8)
    for name in names:
        queue.finish(name, queue.lease(name).key, "committed")
    leases = {name: queue.lease(name).key for name in names}
    for rank in range(8):
        queue.finish(f"n3/{rank}", leases[f"n3/{rank}"], "store", "no answer")
    assert queue.progress().fatal is None


@pytest.mark.parametrize("outcome", ["error", "out-of-memory", "store", "diverged"])
def test_a_bad_worker_is_retired_by_name_and_all_trials_are_done(outcome):
    queue, names = fleet(200, 8, 8)
    committed = run(queue, names, lambda name, *_: outcome if name == "n3/5" else "committed")
    assert committed == dict.fromkeys(range(200), 1)
    progress = queue.progress()
    assert (progress.committed, progress.failed, progress.fatal) == (200, 0, None)
    assert (progress.workers_retired, progress.retired_nodes) == (1, ())
    *_, notice = progress.notices
    assert notice == (
        "worker n3/5 (GPU 5) on node n3 is retired: it failed 3 times in a row where other "
        f"workers succeed; last cause: {outcome} of n3/5"
    )
    assert queue.lease("n3/5") is None
    assert queue.take_lost() == []


@pytest.mark.parametrize("outcome", ["error", "out-of-memory", "store"])
def test_a_bad_node_is_retired(outcome):
    queue, names = fleet(200, 8, 8)
    run(queue, names, lambda name, *_: outcome if name.startswith("n3/") else "committed")
    progress = queue.progress()
    assert (progress.committed, progress.failed, progress.fatal) == (200, 0, None)
    assert progress.retired_nodes == ("n3",)
    assert any(notice.startswith("node n3 is retired") for notice in progress.notices)
    assert all(queue.lease(f"n3/{rank}") is None for rank in range(8))


# Fleets that must end


@pytest.mark.parametrize("outcome", ["error", "out-of-memory", "store"])
@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_a_study_that_cannot_work_ends_after_a_failure_of_most_workers(workers, outcome):
    queue, names = fleet(200, 1, workers)
    failures = []
    run(queue, names, lambda name, *_: failures.append(name) or outcome)
    assert len(failures) == workers // 2 + 1
    progress = queue.progress()
    assert progress.complete
    assert progress.fatal == f"{outcome} of {failures[-1]}"
    assert progress.fatal_kind == ("store" if outcome == "store" else "error")
    assert progress.workers_retired == 0


def test_a_study_that_cannot_work_ends_also_with_fewer_trials_than_workers():
    queue, names = fleet(1, 1, 64)
    run(queue, names, lambda *_: "error")
    assert queue.progress().fatal_kind == "error"


def test_workers_that_start_are_waited_for_and_not_for_ever():
    clock = Clock()
    queue = TrialQueue([key(t) for t in range(20)], clock=clock)
    for worker_group in ("n0", "n1", "n2"):
        queue.expect(worker_group, 1)
    queue.register("n0/0", "n0", 0)
    run(queue, ["n0/0"], lambda *_: "error", rounds=50)
    assert queue.progress().fatal is None  # the other two may be good
    assert "waits" in queue.progress().notices[0]
    clock.now += rules.START_SECONDS
    run(queue, ["n0/0"], lambda *_: "error", rounds=50)
    assert queue.progress().fatal == "error of n0/0"


def test_the_only_large_node_may_be_bad():
    """Eight of ten workers fail, all on one of three nodes."""
    queue = TrialQueue([key(t) for t in range(60)], clock=Clock())
    names = [*(f"n0/{rank}" for rank in range(8)), "n1/0", "n2/0"]
    for name in names:
        queue.register(name, name[:2], int(name[-1]))
    committed = run(queue, names, lambda name, *_: "error" if "n0" in name else "committed")
    assert committed == dict.fromkeys(range(60), 1)
    assert queue.progress().retired_nodes == ("n0",)


def test_a_store_that_nobody_reaches_any_more_ends_the_fleet():
    queue, names = fleet(200, 4, 2)
    for name in names:
        queue.finish(name, queue.lease(name).key, "committed")
    failures = []
    run(queue, names, lambda name, *_: failures.append(name) or "store")
    assert len(failures) == 5
    assert queue.progress().fatal_kind == "store"


def test_a_fault_of_all_workers_later_ends_the_fleet_after_twenty_failures():
    queue, names = fleet(200, 1, 2)
    failures = []
    run(queue, names, lambda name, _, n: "committed" if n < 5 else failures.append(1) or "error")
    assert len(failures) == rules.FAILURES_IN_A_ROW
    assert "20 trials in a row failed, the last because: error of" in queue.progress().fatal


# Trials that are to blame


def test_a_trial_that_fails_everywhere_is_given_up_and_no_worker_is_blamed():
    queue, names = fleet(100, 8)
    where = []

    def outcome(name, trial, _):
        if trial == 50:
            where.append(name)
        return "error" if trial == 50 else "committed"

    run(queue, names, outcome)
    progress = queue.progress()
    assert (progress.committed, progress.failed, progress.workers_retired) == (99, 1, 0)
    assert len(set(where)) == len(where) == rules.FAILURES_ALLOWED
    (lost,) = queue.take_lost()
    assert (lost.key.trial, lost.cause, lost.attempt) == (50, "error", 3)
    assert lost.message.startswith("error of ")


def test_many_bad_trials_excuse_each_worker_that_met_them():
    queue, names = fleet(120, 6)
    bad = set(range(30, 120, 3))
    committed = run(queue, names, lambda _, trial, n: "error" if trial in bad else "committed")
    progress = queue.progress()
    assert (progress.workers_retired, progress.fatal) == (0, None)
    assert (progress.committed, progress.failed) == (90, 30)
    assert committed.keys() == set(range(120)) - bad


def test_a_bad_first_trial_does_not_end_a_fleet_of_idle_workers():
    """Before the first commit, one trial must not make most workers fail."""
    queue, names = fleet(4, 12)
    busy = {queue.lease(name).key.trial: name for name in names[:4]}
    queue.finish(busy[0], key(0), "error", "bad trial")
    tried = []
    for name in names * 5:
        lease = queue.lease(name) if name not in list(busy.values())[1:] else None
        if lease is not None and lease.key is not None:
            tried.append(name)
            queue.finish(name, lease.key, "error", "bad trial")
    assert len(set(tried) | {busy[0]}) == rules.FAILURES_ALLOWED
    assert queue.progress().fatal is None
    for trial in (1, 2, 3):
        queue.finish(busy[trial], key(trial), "committed")
    run(queue, names, lambda *_: "error")
    progress = queue.progress()
    assert (progress.committed, progress.failed, progress.fatal) == (3, 1, None)


def test_failures_of_a_retired_worker_are_not_held_against_a_trial():
    """Trial 0 diverged twice before; the bad worker's divergence would be the third."""
    from raymem.store import Failure

    past = [Failure(key=key(0), attempt=n, cause="diverged") for n in (1, 2)]
    queue = TrialQueue([key(t) for t in range(30)], failures=past, clock=Clock())
    for worker_group in ("bad", "a", "b"):
        queue.register(worker_group, worker_group, 0)
    run(queue, ["bad", "a", "b"], lambda name, *_: "diverged" if name == "bad" else "committed")
    progress = queue.progress()
    assert (progress.committed, progress.failed, progress.workers_retired) == (30, 0, 1)


def test_a_trial_that_was_given_up_goes_back_when_a_worker_is_retired():
    queue, names = fleet(40, 4)
    bad, good = names[:2], names[2:]
    for name in names:
        queue.finish(name, queue.lease(name).key, "committed")
    # Trial 4 fails on both workers that have gone bad, and once on a good one.
    for name, outcome in ((bad[0], "error"), (bad[1], "error"), (good[0], "error")):
        lease = queue.lease(name)
        assert lease.key == key(4)
        queue.finish(name, lease.key, outcome, "why")
    assert queue.progress().failed == 1
    committed = run(queue, names, lambda n, *_: "error" if n == bad[0] else "committed")
    assert queue.progress().workers_retired == 1
    assert committed[4] == 1
    assert queue.progress().failed == 0


# Second chances


def test_a_restarted_worker_has_one_more_chance_and_then_its_node_is_retired():
    """A node with one worker: its worker group ends, another starts there."""
    queue, names = fleet(100, 4)
    outcome = lambda name, *_: "error" if name.startswith("n0") else "committed"  # noqa: E731
    run(queue, names, outcome, rounds=8)
    assert queue.lease("n0/0") is None
    assert queue.is_broken("n0")
    queue.release_worker_group("n0")
    home = Location(node="n0", host="n0", slot="GPU 0")
    queue.register("n0 again", "group-2", 0, home)
    assert queue.progress().retired_nodes == ()
    run(queue, ["n0 again", *names[1:]], outcome)
    progress = queue.progress()
    assert progress.retired_nodes == ("n0",)
    assert progress.workers_retired == 2
    assert "failed once where" in progress.notices[-2]
    queue.register("n0 third", "group-3", 0, home)
    assert queue.lease("n0 third") is None


def test_a_restarted_worker_that_commits_is_as_good_as_any():
    queue, names = fleet(200, 4)
    run(queue, names, lambda name, *_: "error" if name == "n0/0" else "committed", rounds=8)
    queue.release_worker_group("n0")
    queue.register("n0 again", "group-2", 0, Location(node="n0", host="n0", slot="GPU 0"))
    fails = {3, 4}  # two in a row are not three
    run(
        queue,
        ["n0 again", *names[1:]],
        lambda name, _, n: "error" if name == "n0 again" and n in fails else "committed",
    )
    progress = queue.progress()
    assert (progress.committed, progress.workers_retired) == (200, 1)


def test_a_retired_seat_of_a_worker_group_that_restarts_is_filled_once():
    queue, names = fleet(400, 2, 4)
    outcome = lambda name, *_: "error" if "0/2" in name else "committed"  # noqa: E731
    run(queue, names, outcome, rounds=8)
    for again in range(3):
        names = [f"n0/{rank}{'+' * (again + 1)}" for rank in range(4)] + names[4:]
        for rank in range(4):
            queue.register(names[rank], "n0", rank, Location(node="n0", slot=f"GPU {rank}"))
        run(queue, names, outcome, rounds=8)
    progress = queue.progress()
    assert progress.workers_retired == rules.CHANCES
    assert progress.retired_nodes == ()


def test_the_last_node_is_never_retired():
    queue, names = fleet(60, 1, 8)
    bad = {f"n0/{rank}" for rank in range(4)}
    run(queue, names, lambda name, *_: "error" if name in bad else "committed")
    progress = queue.progress()
    assert (progress.committed, progress.workers_retired) == (60, 4)
    assert progress.retired_nodes == ()


def test_a_worker_group_that_spans_nodes_blames_none_of_them():
    queue = TrialQueue([key(t) for t in range(40)], clock=Clock())
    for worker_group in ("a", "b", "c"):
        queue.register(worker_group, worker_group, 0, Location())
    run(queue, ["a", "b", "c"], lambda name, *_: "error" if name == "b" else "committed")
    progress = queue.progress()
    assert (progress.workers_retired, progress.retired_nodes) == (1, ())
    assert queue.is_broken("b")
    assert not queue.is_broken("a")
    assert "worker b/0 is retired" in progress.notices[-1]


# The class itself


def test_who_may_train_a_trial_that_failed():
    blame = Blame(Clock())
    for rank in range(3):
        blame.arrive("group", rank)
    failed, proven, new = (Place("group", rank) for rank in range(3))
    blame.committed(proven, key(9))
    blame.failed(failed, key(0), "error", "")
    table = {
        (place.rank, need): blame.may_train(place, key(0), need)
        for place in (failed, proven, new)
        for need in Need
    }
    assert table == {
        (0, Need.NONE): False, (0, Need.IDLE): True, (0, Need.ALL_IDLE): True,
        (1, Need.NONE): True, (1, Need.IDLE): True, (1, Need.ALL_IDLE): True,
        (2, Need.NONE): False, (2, Need.IDLE): True, (2, Need.ALL_IDLE): True,
    }  # fmt: skip
    for _ in range(2):
        blame.failed(failed, key(0), "error", "")
    assert not blame.may_train(failed, key(0), Need.IDLE)
    assert not blame.may_train(failed, key(0), Need.ALL_IDLE)  # others tried it less often


def test_two_proven_workers_are_enough_for_a_divergence():
    blame = Blame(Clock())
    for rank in range(5):
        blame.arrive("group", rank)
        blame.committed(Place("group", rank), key(10 + rank))
    for rank, hopeless in ((0, False), (0, False), (1, True)):
        blame.failed(Place("group", rank), key(0), "diverged", "nan")
        assert blame.is_hopeless(key(0)) == hopeless


OUTCOMES = ("error", "out-of-memory", "store", "diverged")


@st.composite
def fleets(draw):
    """Worker groups and workers; fewer than half of the workers fail, always or from their n-th
    trial on.

    A trial is given up when it failed on three proven workers, or diverged on two, so two may go
    bad after commits, one of them by diverging.
    """
    worker_groups, workers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    names = [
        f"n{worker_group}/{rank}"
        for worker_group in range(worker_groups)
        for rank in range(workers)
    ]
    bad = draw(st.lists(st.sampled_from(names), unique=True, max_size=(len(names) - 1) // 2))
    onset = {
        name: draw(st.integers(0, 6)) if n < min(2, len(bad) - 1) else 0
        for n, name in enumerate(bad)
    }
    outcome = {name: draw(st.sampled_from(OUTCOMES)) for name in bad}
    if len(bad) > 1 and outcome[bad[0]] == outcome[bad[1]] == "diverged":
        outcome[bad[1]] = draw(st.sampled_from(OUTCOMES[:-1]))
    return (
        worker_groups,
        workers,
        onset,
        outcome,
        draw(st.integers(1, 40)),
        draw(st.integers(0, 10**6)),
    )


@settings(max_examples=60, deadline=None)
@example(
    given_fleet=(
        2, 4, {"n0/1": 4, "n0/0": 1, "n0/2": 0},
        {"n0/1": "diverged", "n0/0": "error", "n0/2": "error"}, 18, 4326,
    )
)  # fmt: skip
@given(fleets())
def test_while_most_workers_are_good_every_trial_is_committed_once(given_fleet):
    worker_groups, workers, onset, outcome, trials, seed = given_fleet
    random = Random(seed)
    queue, names = fleet(trials, worker_groups, workers)
    committed, tried, held, home = [], dict.fromkeys(names, 0), {}, set()
    for _ in range(200 * (trials + len(names))):
        if len(home) == len(names):
            break
        name = random.choice(names)
        if name in home:
            continue
        if name not in held:
            lease = queue.lease(name)
            if lease is None:
                home.add(name)
            elif lease.key is not None:
                held[name] = lease.key
            continue
        fails = name in onset and tried[name] >= onset[name]
        # Good trials take longer than failures.
        if not fails and random.random() < 0.7:
            continue
        tried[name] += 1
        trial = held.pop(name)
        if not fails:
            committed.append(trial)
        queue.finish(name, trial, outcome[name] if fails else "committed", "as drawn")
    progress = queue.progress()
    assert progress.complete
    assert progress.fatal is None
    assert sorted(committed) == [key(t) for t in range(trials)]
    assert (progress.committed, progress.failed) == (trials, 0)


@settings(max_examples=40, deadline=None)
@given(
    workers=st.integers(1, 9),
    trials=st.integers(1, 40),
    odds=st.lists(st.floats(0, 1), min_size=9, max_size=9),
    seed=st.integers(0, 10**6),
)
def test_whatever_fails_the_fleet_comes_to_its_end(workers, trials, odds, seed):
    random = Random(seed)
    queue, names = fleet(trials, workers)
    chance = dict(zip(names, odds, strict=False))
    run(
        queue,
        names,
        lambda name, *_: random.choice(OUTCOMES) if random.random() < chance[name] else "committed",
    )
    progress = queue.progress()
    assert progress.complete
    if progress.fatal is None:
        assert progress.done + progress.failed == trials
