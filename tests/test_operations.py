"""What an operator sees: failures by cause, why nothing is committed, `raymem status`."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from learners import KnownOdds, memorizes_everything, numbered_examples, recipe

from raymem import Store, Study, verify
from raymem.cli import main
from raymem.errors import FleetError
from raymem.fleet import Progress, TrialQueue, trackers
from raymem.fleet.blame import Location
from raymem.fleet.metrics import METRICS, FleetMetrics
from raymem.fleet.progress import Capacity, GroupProgress, Report, why_no_commit
from raymem.fleet.watch import FleetWatch
from raymem.show import describe_store, watch_status
from raymem.show.study_status import StudyStatus
from raymem.store import FailureLog, TrialKey, failure_causes
from raymem.store.lock import process_start

ROOT = Path(__file__).parents[1]
board = importlib.import_module("deploy.board")


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
    # One failed before the commit, three since.
    assert progress.failures_since_commit == 3
    assert "no heartbeat" in progress.last_failure
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
        "process_started": process_start(os.getpid()), "started": now.isoformat(),
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


class Metrics:
    """Stands in for Ray's metrics: what each was set to, or counted up to."""

    def __init__(self):
        self.values = {}

    def __call__(self, name):
        return Reading(self.values, name)


class Reading:
    def __init__(self, values, name):
        self.values, self.name = values, name

    def set(self, number, tags):
        self.values[self.name, *tags.values()] = number

    def inc(self, number, tags):
        assert number > 0
        at = (self.name, *tags.values())
        self.values[at] = self.values.get(at, 0.0) + number


def test_metrics_are_what_the_queue_knows(queue, clock):
    made = Metrics()
    metrics = FleetMetrics("0123456789abcdef", made)
    queue.set_capacity(Capacity(nodes=2, with_room=2, asked=5, need="1 CPUs and 1 GPUs"))
    first = queue.lease("a0").key
    queue.lease("b0")
    clock.now = 40.0
    queue.finish("a0", first, "committed", report=Report(measures={"seconds": 33.0}))
    for _ in range(2):
        metrics.show(queue.progress())
    clock.now = 50.0
    queue.finish("a0", queue.lease("a0").key, "diverged", "nan")
    queue.release_worker_group("group-001")
    metrics.show(queue.progress())
    study = "0123456789ab"
    values = {name: value for (name, *at), value in made.values.items() if at == [study]}
    assert values == {
        "raymem_trials_wanted": 10, "raymem_trials_done": 1, "raymem_trials_running": 0,
        "raymem_trials_committed_total": 1, "raymem_trial_seconds": 40,
        "raymem_device_seconds_total": 33, "raymem_seconds_left": 360,
        "raymem_seconds_since_commit": 10, "raymem_workers_starting": 0,
        "raymem_workers_silent": 0, "raymem_workers_retired": 0, "raymem_workers_asked": 5,
        "raymem_nodes": 2, "raymem_nodes_retired": 0,
    }  # fmt: skip
    assert made.values["raymem_workers", study, "a"] == 2
    assert made.values["raymem_workers", study, "b"] == 0
    outcomes = {at[2]: n for at, n in made.values.items() if at[0] == "raymem_attempts_total"}
    assert outcomes == {"committed": 1, "diverged": 1, "node-lost": 1}
    never = {"raymem_images_total", "raymem_trials_failed_total"}
    assert {name for name, *_ in made.values} == METRICS.keys() - never


def test_the_dashboard_and_the_page_show_every_metric():
    assert board.FILE.read_text() == board.text(), "run python deploy/board.py"
    shown = set(re.findall(r"ray_(raymem_\w+)\{", board.text()))
    assert shown == METRICS.keys()
    page = (ROOT / "docs" / "how-to" / "operate-a-fleet.md").read_text()
    listed = dict(re.findall(r"^\| `ray_(raymem_\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert listed == {
        name: metric.meaning + (f"; by `{metric.tag}`" if metric.tag else "")
        for name, metric in METRICS.items()
    }
    ids = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board.board()["panels"]]
    assert len(set(ids)) == len(ids) == 9


def test_logs_of_the_serial_engine_are_json_lines_with_trial_worker_and_host(tmp_path, capsys):
    study_of(memorizes_everything, tmp_path, trials=2).train(engine="serial", log_format="json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    starts = [line for line in lines if line.get("event") == "leased"]
    ends = [line for line in lines if line.get("event") == "ended"]
    assert [(line["trial"], line["epsilon"], line["attempt"]) for line in starts] == [
        (0, "inf", 1), (1, "inf", 1),
    ]  # fmt: skip
    assert {line["outcome"] for line in ends} == {"committed"}
    assert all(line["train_accuracy"] == 1.0 for line in ends)
    assert {(line["worker"], line["host"]) for line in ends} == {("serial", socket.gethostname())}
    assert [line["event"] for line in lines].count("progress") >= 1
    # Without it, nothing is logged.
    study_of(memorizes_everything, tmp_path, trials=4).train(engine="serial")
    assert "{" not in capsys.readouterr().err


def test_a_failure_is_logged_with_its_traceback_on_one_line(tmp_path, capsys):
    with pytest.raises(FleetError):
        study_of(fails, tmp_path).train(engine="serial", log_format="json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    failed = next(line for line in lines if line.get("outcome") == "error")
    assert failed["level"] == "WARNING"
    assert failed["message"] == "trial 0 failed: error"
    assert "ZeroDivisionError: my own mistake" in failed["cause"]
    assert 'raise ZeroDivisionError("my own mistake")' in failed["traceback"]


JOB = """
from raymem import JobSettings, Recipe, run_job
run_job(JobSettings(data="digits", store="x", trials=3), Recipe(model="mlp-8", epochs=1))
"""


@pytest.mark.slow
@pytest.mark.alone
def test_workers_on_ray_log_json_with_their_node(tmp_path):
    """A private Ray, whose folder is ours to read."""
    (tmp_path / "job.py").write_text(JOB)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ran = subprocess.run(
            [sys.executable, "job.py", "train", "--store", str(tmp_path / "store"),
             "--log-format", "json"],
            cwd=tmp_path, env={**os.environ, "RAY_TMPDIR": folder}, capture_output=True, text=True,
            timeout=200,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        logs = Path(folder).glob("ray/session_2*/logs/train/ray-train-app-worker-*.log")
        text = "\n".join(path.read_text() for path in logs)
    lines = [json.loads(line) for line in text.splitlines() if '"event"' in line]
    ended = [line for line in lines if line["event"] == "ended"]
    assert {line["trial"] for line in ended} == {0, 1, 2}
    for line in ended:
        assert line["outcome"] == "committed"
        assert re.fullmatch(r"group-000/\d/\w{8}", line["worker"])
        assert len(line["node_id"]) == 56
    driver = [json.loads(line) for line in ran.stderr.splitlines()]
    assert {line["event"] for line in driver} == {"progress"}


def tracked_study(tmp_path, tracker, **settings):
    store = tmp_path / "store"
    study = study_of(memorizes_everything, store, trials=3)
    study.train(engine="serial", tracker=tracker, tracker_url=str(tmp_path / "runs"), **settings)
    return study


def test_tensorboard_has_the_accuracies_of_every_trial(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    study = tracked_study(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "runs").iterdir()
    assert study.open_store().study().hash[:12] in folder.name
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    accuracy = events.Scalars("eps-inf/train_accuracy")
    assert [(e.step, e.value) for e in accuracy] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert events.Scalars("trials/done")[-1].value == 3
    # Another run of the job goes on where this one was.
    dataclasses.replace(study, trials=5).train(
        engine="serial", tracker="tensorboard", tracker_url=str(tmp_path / "runs")
    )
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("eps-inf/test_accuracy")] == [1, 2, 3, 4, 5]


def test_mlflow_has_settings_and_accuracies(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    # A folder is enough here; MLflow would rather have a server or a database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    study = tracked_study(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=str(tmp_path / "runs"))
    experiment = client.get_experiment_by_name("raymem")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["study"] == study.open_store().study().hash
    assert run.data.params["recipe.epochs"] == "2"
    history = client.get_metric_history(run.info.run_id, "eps-inf/train_accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    dataclasses.replace(study, trials=5).train(
        engine="serial", tracker="mlflow", tracker_url=str(tmp_path / "runs")
    )
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "eps-inf/train_accuracy")
    assert [m.step for m in history] == [1, 2, 3, 4, 5]


def test_wandb_logs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked_study(tmp_path, "wandb")
    (file,) = (tmp_path / "runs").rglob("run-*.wandb")
    data = file.read_bytes()
    assert b"eps-inf/train_accuracy" in data


def test_a_tracker_that_is_not_there_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(FleetError, match=r"--tracker mlflow .* pip install 'raymem\[mlflow\]'"):
        tracked_study(tmp_path, "mlflow")
    assert Store(tmp_path / "store").done() == set()
    assert not (tmp_path / "store" / "driver.json").exists()


def test_a_tracker_that_fails_later_does_not_stop_the_fleet(tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, about, url):
            pass

        def log(self, numbers, step):
            raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers.CLIENTS, "mlflow", Broken)
    study = tracked_study(tmp_path, "mlflow")
    assert len(study.open_store().done()) == 3
    said = "--tracker mlflow failed, going on without it: no route to host"
    assert capsys.readouterr().err.count(said) == 1
