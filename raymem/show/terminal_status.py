"""How far a study is, for a terminal: once, or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from raymem.encoding import counted, duration
from raymem.fleet.progress_line import drawn
from raymem.show.study_status import StudyStatus
from raymem.store import FailureCause, MergeSummary, Store

# Without --tracebacks: of these causes, the last lines of each.
CAUSES_SHOWN, TRACEBACK_LINES = 5, 5
NODES_SHOWN, TRIALS_SHOWN = 3, 5


def describe_store(store: Store, *, price: float | None = None, tracebacks: bool = False) -> str:
    """What `raymem status` prints."""
    streamed = _streamed(store)
    if streamed and not store.files.exists("study.json"):
        return "\n".join([f"{store.url}: no study, only curvature of shards", *streamed])
    status = StudyStatus.read(store, price=price)
    part = f" of {status.part}" if status.part else ""
    more = f", and {status.beyond:,} more" if status.beyond else ""
    return "\n".join(
        [
            f"{status.url}: {status.study}",
            f"trials: {status.done:,} of {status.wanted:,} done{part}{more}",
            *status_lines(status, tracebacks=tracebacks, rate=True),
            *streamed,
            *_until(store),
        ]
    )


def status_lines(
    status: StudyStatus, *, tracebacks: bool = False, rate: bool = False
) -> Iterator[str]:
    """The driver, its workers, failures and cost; the `rate` too, if no bar shows it."""
    yield from _driver(status)
    progress = status.progress
    if "stage" in progress:
        yield f"running: {progress['stage']}, {progress['left']:,} parts left"
    elif rate and status.driver_is == "alive":
        yield _rate(progress)
    for group in status.groups:
        name = f"node {group.node}" if group.node else group.name
        failed = f", {counted(group.failed, 'attempt')} failed" if group.failed else ""
        yield (
            f"  {name}: {counted(group.workers, 'worker')}, {group.running} running, "
            f"{counted(group.committed, 'trial')} done{failed}"
        )
    stalled = None if status.driver is None else status.stalled()
    if stalled and status.driver_is == "alive":
        yield f"STALLED: {stalled}"
    elif status.quiet_seconds is not None and status.driver_is == "alive":
        yield f"last commit: {duration(status.quiet_seconds)} ago"
    yield from progress.get("notices", ())
    yield from _failures(status, tracebacks)
    if status.cost is not None:
        yield _cost(status)


def _streamed(store: Store) -> list[str]:
    return [
        f"curvature of {model}: {counted(len(shards), 'shard')}"
        for model, shards in sorted(store.streamed().items())
    ]


def _driver(status: StudyStatus) -> Iterator[str]:
    driver = status.driver
    if driver is None:
        yield "driver: none"
    elif status.driver_is == "dead":
        yield f"driver: died (process {driver['pid']} on {driver['host']}); rerun the job"
    elif status.driver_is == "silent":
        yield f"driver: {status.stalled()}"
    else:
        yield f"driver: process {driver['pid']} on {driver['host']} since {driver['started']}"


def _rate(progress: Any) -> str:
    if not progress.get("rate"):
        return f"running: {progress.get('running', 0)}"
    left = progress.get("seconds_left")
    return (
        f"running: {progress['running']}, {duration(1 / progress['rate'])} per trial, "
        f"{duration(left or 0)} left"
    )


def _failures(status: StudyStatus, tracebacks: bool) -> Iterator[str]:
    if status.failed_attempts:
        kinds = ", ".join(f"{n} {kind}" for kind, n in status.failed_attempts.items())
        yield f"failed attempts: {kinds}; {status.given_up} trials have no result"
    shown = status.causes if tracebacks else status.causes[:CAUSES_SHOWN]
    if shown:
        yield "failures by cause, in all runs:"
    for cause in shown:
        yield f"  {cause_text(cause)}"
        lines = cause.traceback.splitlines()
        for line in lines if tracebacks else lines[-TRACEBACK_LINES:]:
            yield f"      {line}"
    if len(shown) < len(status.causes):
        yield f"  and {len(status.causes) - len(shown)} more causes; --tracebacks shows all"


def cause_text(cause: FailureCause) -> str:
    """A cause of failures in one line.

    >>> cause_text(FailureCause(
    ...     kind="error", cause="ValueError: no", times=3, trials=("eps-inf-000004",),
    ...     nodes={"a": 3}, first="2026-11-27T10:00:00+00:00", last="2026-11-27T11:00:00+00:00",
    ... ))
    '3 x error: ValueError: no; eps-inf-000004; on a (3); first 2026-11-27 10:00, last 11-27 11:00'
    """
    trials = ", ".join(cause.trials[:TRIALS_SHOWN])
    if len(cause.trials) > TRIALS_SHOWN:
        trials += ", ..."
    most = sorted(cause.nodes.items(), key=lambda item: -item[1])
    nodes = ", ".join(f"{node} ({times})" for node, times in most[:NODES_SHOWN])
    if len(most) > NODES_SHOWN:
        nodes += f" and {counted(len(most) - NODES_SHOWN, 'more node')}"
    first, last = (time[:16].replace("T", " ") for time in (cause.first, cause.last))
    parts = [trials, f"on {nodes}" if nodes else "", f"first {first}, last {last[5:]}"]
    return f"{cause.times} x {cause.kind}: {'; '.join([cause.cause, *filter(None, parts)])}"


def _until(store: Store) -> Iterator[str]:
    """What a stopping rule has seen, and where it expects to stop."""
    note = store.note("until")
    if note is None:
        return
    seen = note["interim"][-1]
    value = "?" if seen["value"] is None else f"{seen['value']:.3f}"
    forecast = (
        "no forecast" if seen["forecast"] is None else f"forecast: {seen['forecast']:,} trials"
    )
    yield (
        f"until {note['rule']}: {value} at {seen['trials']:,} trials, {forecast}, at most "
        f"{note['most_trials']:,}"
    )


def _cost(status: StudyStatus) -> str:
    cost = status.cost
    assert cost is not None
    about = "" if cost.sampled == cost.trials else f", from {cost.sampled} of them"
    so_far, whole = cost.seconds(), cost.seconds(status.wanted)
    text = (
        f"cost so far: {duration(so_far)} of {' and '.join(cost.devices)}{cost.priced(so_far)}, "
        f"{duration(cost.mean_seconds)} a trial{about}"
    )
    if status.complete:
        return text
    return f"{text}; all {status.wanted:,} trials: {duration(whole)}{cost.priced(whole)}"


def watch_status(
    store: Store,
    *,
    every: float,
    price: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> StudyStatus:
    """Show the status every so many seconds, until all trials are done or Ctrl-C; returns the last.

    A bar with lines below on a terminal. Elsewhere, a line whenever something has changed.
    """
    show = _on_terminal if sys.stdout.isatty() else _in_lines
    statuses = _statuses(store, every, price, sleep)
    return show(statuses)


def _statuses(
    store: Store, every: float, price: float | None, sleep: Callable[[float], None]
) -> Iterator[StudyStatus]:
    while True:
        status = StudyStatus.read(store, price=price)
        yield status
        if status.over:
            return
        sleep(every)


def _on_terminal(statuses: Iterator[StudyStatus]) -> StudyStatus:
    # Takes 50 ms to import, and logs need none of it.
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        for status in statuses:
            lines = [f"{status.url}: {status.study}", *status_lines(status)]
            live.update(Group(drawn(status.snapshot), Text("\n".join(lines))), refresh=True)
    return status


def _in_lines(statuses: Iterator[StudyStatus]) -> StudyStatus:
    told: set[str] = set()
    last = ""
    for status in statuses:
        stalled = status.stalled()
        # The time in it moves; that it stalls, and why, is told once.
        news = {cause.cause: cause_text(cause) for cause in status.causes}
        if stalled:
            news[f"{status.driver_is} {status.progress.get('why_no_commit')}"] = stalled
        line = str(status.snapshot)
        if line != last:
            print(line, flush=True)
        for key in news.keys() - told:
            print(news[key], flush=True)
        # A stall that has passed may come again.
        told, last = set(news), line
    return status


def merge_text(summary: MergeSummary) -> str:
    """What `raymem merge` prints."""
    s = summary
    lines = [
        f"{s.url}: {counted(s.trials, 'trial')}, {s.missing:,} more are wanted",
        f"copied: {counted(s.copied, 'trial')}, weights of {counted(s.weights, 'model')}, "
        f"{counted(s.failures, 'failed attempt')}, {counted(s.shards, 'shard')} of curvature; "
        f"{counted(s.there, 'trial')} already there",
        f"in both: {counted(s.in_both, 'trial')}",
    ]
    if s.drift:
        lines.append(
            f"drift: {s.drift:,} trials have two results, of other hardware or a GPU; the first "
            "store's stay"
        )
    plan = Store(s.url).plan()
    if not plan.is_known:
        then = f"import the file into it once more, which scores: raymem import npz FILE {s.url}"
    elif s.missing:
        then = f"run its job with --store {s.url}, which trains what is missing and scores"
    elif plan.experiment is not None:
        then = f"raymem {plan.kind} {s.url}"
    else:
        then = f"score, the job's `score` stage: python jobs/NAME.py score --store {s.url}"
    return "\n".join([*lines, f"not copied: scores, links, report; next, {then}"])
