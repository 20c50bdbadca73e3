"""Progress of long stages: bars on terminals, a line now and then in logs, no hasty forecasts."""

from __future__ import annotations

import io
import sys

import pytest

from raymem.fleet import ProgressLine, Snapshot, TrialQueue, progress_line
from raymem.fleet.long_stage import StageProgress
from raymem.fleet.progress_line import fleet_snapshot
from raymem.store import TrialKey


def snapshot(done, total=400, **more):
    return Snapshot(what="training", unit="trials", done=done, total=total, **more)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    for module in ("raymem.fleet.progress_line", "raymem.fleet.long_stage"):
        monkeypatch.setattr(f"{module}.time.monotonic", lambda: now[0])
    return now


def test_one_unit_says_nothing_of_the_time_left(clock):
    """A first image that took 12 s is no reason to announce six and a half hours."""
    stage = StageProgress(what="decoding", unit="shards", total=2000, started=clock[0])
    clock[0] += 12
    stage.add(done=1, images=1, bad=0)
    assert "left" not in str(stage)
    for _ in range(30):
        clock[0] += 2
        stage.add(done=1, images=1, bad=0)
    # 30 shards in 60 s since the first, 1,969 are left.
    assert str(stage).endswith("1 h 5 min left")


def test_a_fleet_says_what_is_left_when_enough_is_done():
    keys = [TrialKey(float("inf"), n) for n in range(100)]
    now = [0.0]
    queue = TrialQueue(keys, clock=lambda: now[0])
    queue.register("worker", "group-000", 0)
    said = []
    for _ in range(4):
        key = queue.lease("worker").key
        now[0] += 10
        queue.finish("worker", key, "committed")
        said.append(str(fleet_snapshot(queue.progress())))
    assert ["left" in text for text in said] == [False, False, True, True]
    assert said[-1] == "trials 4/100, 10 s per trial, 16 min 0 s left"
    assert fleet_snapshot(queue.progress()).groups == [
        "group-000: 1 worker, 0 running, 4 trials done"
    ]


def test_a_log_has_a_line_now_and_then(clock, capsys):
    line = ProgressLine()
    for second in range(3600):
        clock[0] = 1000.0 + second
        line.show(snapshot(second, 3600))
    line.show(snapshot(3600, 3600), last=True)
    line.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trials 0/3,600"
    assert lines[-1] == "trials 3,600/3,600"
    assert 10 <= len(lines) <= 20


def test_a_terminal_has_a_bar_with_rate_time_left_and_worker_groups(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    line = ProgressLine()
    line.show(
        snapshot(
            100, rate="2.6 s per trial", seconds_left=780.0, notes=["4 running"],
            groups=["group-000: 2 workers", "group-001: 2 workers"],
        ),
        last=True,
    )  # fmt: skip
    line.say("a worker died")
    line.close()
    shown = terminal.getvalue()
    for part in ("100/400 trials", "2.6 s per trial", "13 min 0 s left", "4 running",
                 "group-001: 2 workers", "a worker died"):  # fmt: skip
        assert part in shown, part
    assert progress_line.BAR_WIDTH < 40
