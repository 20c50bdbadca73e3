"""What an operator sees: failures by cause, why nothing is committed, `raymem status`."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import socket
import sys
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from click.testing import CliRunner
from learners import KnownOdds, memorizes_everything, numbered_examples, recipe

from raymem import FleetError, Store, Study, TrialKey, verify
from raymem.cli import main
from raymem.fleet import Progress, TrialQueue
from raymem.fleet.blame import Location
from raymem.fleet.progress import Capacity, GroupProgress, Report, why_no_commit
from raymem.fleet.watch import FleetWatch
from raymem.show import describe_store, watch_status
from raymem.show.study_status import StudyStatus
from raymem.store import FailureLog, failure_causes


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def key(trial):
    return TrialKey(math.inf, trial)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    """Two workers on node a, one on node b, ten trials."""
    queue = TrialQueue([key(n) for n in range(10)], clock=clock)
    for name, group, rank in (
        ("a0", "group-000", 0),
        ("a1", "group-000", 1),
        ("b0", "group-001", 0),
    ):
        host = name[0]
        queue.expect(group, 2 if host == "a" else 1)
        queue.register(name, group, rank, Location(node=f"id-{host}", host=host, slot=str(rank)))
    return queue


def test_the_driver_hears_what_became_of_every_attempt(queue, clock):
    failed, done, lost = (queue.lease(name).key for name in ("a0", "a1", "b0"))
    clock.now = 30.0
    queue.finish("a0", failed, "error", "trial 0 failed: ValueError", Report(traceback="Traceback"))
    queue.finish("a1", done, "committed", report=Report(measures={"test_accuracy": 0.5}))
    queue.register("b0 again", "group-001", 0, Location(node="id-b", host="b"))
    events = queue.take_events()
    assert [(e.key, e.outcome, e.worker, e.node) for e in events] == [
        (failed, "error", "group-000/0", "a"),
        (done, "committed", "group-000/1", "a"),
        (lost, "worker-died", "group-001/0", "b"),
    ]
    assert events[0].report.traceback == "Traceback"
    assert events[1].report.measures == {"test_accuracy": 0.5}
    assert queue.take_events() == []
    queue.lease("b0 again")
    queue.release_worker_group("group-001")
    clock.now = 31.0
    queue.lease("a1")
    clock.now = 1000.0
    progress = queue.progress()
    assert [e.outcome for e in queue.take_events()] == ["node-lost", "no-heartbeat"]
    assert progress.outcomes == {
        "error": 1, "committed": 1, "worker-died": 1, "node-lost": 1, "no-heartbeat": 1,
    }  # fmt: skip
    assert progress.trial_seconds == 30.0
    assert progress.quiet_seconds == 970.0
    group = progress.groups[0]
    assert (group.node, group.committed, group.failed) == ("a", 1, 2)


def test_a_late_failure_of_an_expired_lease_is_not_counted_twice(queue, clock):
    leased = queue.lease("a0").key
    clock.now = 1000.0
    queue.progress()
    queue.finish("a0", leased, "error", "late")
    assert [event.outcome for event in queue.take_events()] == ["no-heartbeat"]


def log_of(store, now):
    return FailureLog(store, now=lambda: now[0])


def add(log, trial, message, *, kind="error", node="a", traceback=""):
    log.add(
        key(trial), kind=kind, attempt=1, worker="group-000/1", node=node, message=message,
        traceback=traceback,
    )  # fmt: skip


def test_failures_are_grouped_by_cause_over_runs_and_the_first_traceback_stays(tmp_path):
    store, now = Store(tmp_path), [datetime(2026, 11, 27, 10, tzinfo=UTC)]
    log = log_of(store, now)
    add(log, 3, "trial 3 failed: RuntimeError: 17 rows (net.py:8)", traceback="first")
    add(
        log,
        4,
        "trial 4 at epsilon 2 failed: RuntimeError: 18 rows (net.py:8)\n",
        traceback="second",
    )
    add(log, 4, "the loss is nan after epoch 3", kind="diverged", node="b")
    log.write()
    now[0] += timedelta(hours=1)
    log = log_of(store, now)
    add(log, 3, "trial 3 failed: RuntimeError: 19 rows (net.py:8)", node="b", traceback="third")
    log.write(last=True)
    rows, nan = failure_causes(store)
    assert (rows.cause, rows.times, rows.kind) == ("RuntimeError: 17 rows (net.py:8)", 3, "error")
    assert rows.trials == ("eps-inf-000003", "eps-inf-000004")
    assert rows.nodes == {"a": 2, "b": 1}
    assert rows.traceback == "first"
    assert (rows.first, rows.last) == ("2026-11-27T10:00:00+00:00", "2026-11-27T11:00:00+00:00")
    assert (nan.cause, nan.times) == ("the loss is nan after epoch 3", 1)


def test_a_storm_of_one_cause_is_written_now_and_then(tmp_path):
    store, now = Store(tmp_path), [datetime(2026, 11, 27, 10, tzinfo=UTC)]
    log = log_of(store, now)
    times = []
    for trial in range(30):
        add(log, trial, f"trial {trial} failed: ValueError: no")
        log.write()
        now[0] += timedelta(seconds=1)
        times.append(failure_causes(store)[0].times)
    assert times[:10] == [1] * 10
    assert times[10] == 11
    assert len(set(times)) == 3
    log.write(last=True)
    (cause,) = failure_causes(store)
    assert cause.times == 30
    assert len(cause.trials) == 20


WAITING = Progress(
    total=10, done=2, committed=2, running=0, failed=0, drift=0, deaths=0, rate=0.1,
    complete=False, fatal=None, fatal_kind=None,
)  # fmt: skip
TWO = (GroupProgress("group-000", 2, 2, 2),)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"starting": 8}, "no workers yet: 8 are starting"),
        (
            {"capacity": Capacity(nodes=3, with_room=0, asked=32, need="1 CPUs and 1 GPUs")},
            "no workers, waiting for nodes: none of the cluster's 3 has 1 CPUs and 1 GPUs for a "
            "trial; the autoscaler is asked for room for 32",
        ),
        (
            {
                "capacity": Capacity(nodes=3, with_room=0, asked=0, need="1 CPUs and 1 GPUs"),
                "retired_nodes": ("x", "y"),
            },
            "for a trial, 2 are retired; `ray status`",
        ),
        (
            {"groups": TWO, "running": 2, "trial_seconds": 3600, "longest_seconds": 2400},
            "trials take about 1 h 0 min, and the longest running one has trained for 40 min 0 s",
        ),
        (
            {"groups": TWO, "running": 2, "trial_seconds": 60, "longest_seconds": 2400},
            "has trained for 40 min 0 s: they may hang",
        ),
        (
            {"groups": TWO, "running": 2, "longest_seconds": 2400},
            "2 trials in training, none committed in this run, so that nobody knows how long",
        ),
        ({"groups": TWO, "running": 2, "silent": 2}, "2 of 2 workers send no heartbeat"),
        (
            {"groups": TWO, "failures_since_commit": 14, "last_failure": "CUDA error"},
            "everything fails: 14 attempts in a row, the last because: CUDA error",
        ),
        (
            {
                "groups": TWO, "running": 2, "trial_seconds": 60, "longest_seconds": 90,
                "failures_since_commit": 1, "last_failure": "CUDA error",
            },
            "for 1 min 30 s; 1 attempt failed meanwhile, the last because: CUDA error",
        ),
        ({"groups": TWO}, "2 workers and no trial in training"),
    ],
)  # fmt: skip
def test_why_nothing_is_committed_is_said_in_words(state, words):
    assert words in why_no_commit(dataclasses.replace(WAITING, **state))


def heartbeats(queue):
    for worker in ("a0", "a1", "b0"):
        queue.heartbeat(worker)


class Said:
    """Stands in for a LongStage: keeps what is said."""

    def __init__(self):
        self.said, self.line, self.preempted = [], self, self
        self.stop_asked = False

    def is_set(self):
        return False

    def say(self, message):
        self.said.append(message)

    def show(self, snapshot, *, last):
        pass


def test_the_driver_says_why_nothing_is_committed_and_again_when_the_time_has_doubled(
    tmp_path, queue, clock
):
    stage, latest = Said(), {}
    watch = FleetWatch(Store(tmp_path), stage, latest, stalled_seconds=600.0)
    queue.lease("a0")
    for clock.now in range(0, 3000, 30):
        heartbeats(queue)
        watch(queue, queue.progress())
    told = [re.search(r"for (\d+ min)", text)[1] for text in stage.said]
    assert told == ["10 min", "20 min", "40 min"]
    assert "1 trial in training, none committed in this run" in stage.said[0]
    assert "trained for" in latest["why_no_commit"]
    queue.finish("a0", key(0), "committed")
    queue.lease("a1")
    for clock.now in range(3000, 3700, 30):
        heartbeats(queue)
        watch(queue, queue.progress())
    assert len(stage.said) == 4


class Failing(KnownOdds):
    def forward(self, x):
        if self.training:
            raise ZeroDivisionError("my own mistake")
        return super().forward(x)


def fails(n_classes, image_shape):
    return Failing(1.0, 0.0)


def study_of(model, store, trials=4):
    return Study(examples=numbered_examples(), recipe=recipe(model), store=store, trials=trials)


def test_the_traceback_of_a_users_model_is_kept_in_the_store_and_shown(tmp_path):
    with pytest.raises(FleetError, match="my own mistake"):
        study_of(fails, tmp_path).train(engine="serial")
    store = Store(tmp_path)
    (cause,) = failure_causes(store)
    assert cause.times >= 1
    assert cause.cause.startswith("ZeroDivisionError: my own mistake (")
    assert 'raise ZeroDivisionError("my own mistake")' in cause.traceback
    assert {problem.kind for problem in verify(store)} == {"missing"}
    ran = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert "x error: ZeroDivisionError: my own mistake" in ran.output
    assert 'raise ZeroDivisionError("my own mistake")' in ran.output
    assert "most recent call last" not in ran.output
    whole = CliRunner().invoke(main, ["status", str(tmp_path), "--tracebacks"])
    assert "most recent call last" in whole.output


@pytest.fixture
def store(tmp_path):
    study_of(memorizes_everything, tmp_path, trials=4).train(engine="serial")
    study = study_of(memorizes_everything, tmp_path, trials=10)
    opened = study.open_store()
    opened.target = study.target
    return opened


def driven(store, *, host=None, heartbeat=0.0, quiet=10.0, **progress):
    """The store as a live driver has it: this process, or one on another host."""
    now = datetime.now(UTC)
    record = {
        "token": "t", "host": host or socket.gethostname(), "pid": os.getpid(),
        "process_started": psutil.Process().create_time(), "started": now.isoformat(),
        "interval": 5.0, "counter": 3,
        "heartbeat": (now - timedelta(seconds=heartbeat)).isoformat(),
        "progress": {
            "done": 4, "total": 10, "running": 2, "rate": 0.5, "seconds_left": 12.0,
            "starting": 0, "stalled_seconds": 1800.0, "why_no_commit": "trials are long",
            "quiet_since": (now - timedelta(seconds=quiet)).isoformat(), "notices": [],
            "groups": [GroupProgress("group-000", 2, 2, 4, 1, "a")._asdict()], **progress,
        },
    }  # fmt: skip
    store.files.replace("driver.json", json.dumps(record).encode())


def test_status_says_where_workers_are_and_what_it_costs(store):
    driven(store)
    text = describe_store(store, price=2.0)
    assert "trials: 4 of 10 done" in text
    assert "running: 2, 2 s per trial, 12 s left" in text
    assert "  node a: 2 workers, 2 running, 4 trials done, 1 attempt failed" in text
    assert "last commit: 10 s ago" in text
    assert re.search(r"cost so far: .* of cpu \(0\.00\), .* all 10 trials: .* \(0\.00\)", text)
    assert "STALLED" not in text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"quiet": 2000.0}, "no trial committed for 33 min 20 s: trials are long"),
        ({"host": "elsewhere", "heartbeat": 900.0}, "has sent no heartbeat for 15 min 0 s"),
        ({"host": "elsewhere"}, None),
        ({}, None),
        (None, "no driver: no job trains this study"),
    ],
)
def test_a_dead_mans_check_exits_with_1_and_says_why(store, state, words):
    if state is not None:
        driven(store, **state)
    ran = CliRunner().invoke(main, ["status", store.url, "--stalled-after", "30"])
    assert ran.exit_code == (0 if words is None else 1), ran.output
    assert (words or "not stalled") in ran.output
    known = json.loads(CliRunner().invoke(main, ["status", store.url, "--json"]).output)
    assert (known["done"], known["wanted"]) == (4, 10)
    assert known["stalled"] is None if words is None else words in known["stalled"]


def test_a_finished_study_is_not_stalled_though_a_trial_was_given_up(store):
    for trial in range(4, 10):
        store.record_failure(key(trial), 3, "diverged", "nan")
    assert StudyStatus.read(store).stalled() is None
    assert StudyStatus.read(store).over


def advancing(store, tmp_path):
    """Each sleep, the fleet is further: more rate, then a stall, then it is done."""
    states = iter([{"quiet": 2000.0, "running": 1}, {"quiet": 2060.0, "running": 1}, None])

    def sleep(seconds):
        state = next(states)
        if state is not None:
            driven(store, **state)
            return
        store.files.delete("driver.json")
        study_of(memorizes_everything, tmp_path, trials=10).train(engine="serial")

    return sleep


def test_watching_in_a_log_has_a_line_for_each_change(store, tmp_path, capsys):
    driven(store)
    log = FailureLog(store)
    add(log, 1, "trial 1 failed: ValueError: no", traceback="Traceback\n  in net.py")
    log.write()
    last = watch_status(store, every=1.0, sleep=advancing(store, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trials 4/10, 2 running, 2 s per trial, 12 s left"
    assert lines[1].startswith("1 x error: ValueError: no")
    assert lines[2] == "trials 4/10, 1 running, 2 s per trial, 12 s left"
    assert lines[3] == "no trial committed for 33 min 20 s: trials are long"
    assert lines[4:] == ["trials 10/10"]
    assert last.complete


def test_watching_on_a_terminal_has_a_bar(store, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    driven(store)
    watch_status(store, every=1.0, sleep=advancing(store, tmp_path))
    shown = terminal.getvalue()
    for part in (
        "4/10 trials", "2 s per trial", "12 s left", "2 running", "node a: 2 workers",
        "STALLED: no trial committed for 33 min 20 s: trials are long", "10/10 trials",
    ):  # fmt: skip
        assert part in shown, part
