"""How far a long stage is, for a person: a bar on a terminal, a line now and then in a log.

In:  a `Snapshot` whenever something happened. Out: stderr. Every stage shows its progress here.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymem.encoding import counted, duration
from raymem.fleet.progress import Progress

if TYPE_CHECKING:
    from rich.live import Live

# A log has a line after so many seconds, then after twice as many, up to the second number.
FIRST_LOG_SECONDS, MOST_LOG_SECONDS = 10.0, 300.0
# The time left is told when so much is done: one unit says little of the others.
UNITS_FOR_FORECAST, SHARE_FOR_FORECAST = 3, 0.01
BAR_WIDTH = 28
# More worker groups than these are counted, not listed.
GROUPS_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a stage is."""

    what: str
    """What is done: training, ..."""
    unit: str
    """What is counted, in the plural."""
    done: int
    total: int
    rate: str = ""
    """As people read it: 2.6 s per trial."""
    seconds_left: float | None = None
    """None: not known yet."""
    notes: Sequence[str] = ()
    """What else to know of it: running, failed, ..."""
    groups: Sequence[str] = ()
    """A line for each worker group; shown on a terminal only, where there are several."""

    @property
    def complete(self) -> bool:
        """Is all of it done?"""
        return self.done >= self.total

    @property
    def left(self) -> str:
        """The time left; empty if it is not known, or nothing is left."""
        if self.seconds_left is None or self.complete:
            return ""
        return f"{duration(self.seconds_left)} left"

    def __str__(self) -> str:
        counted = f"{self.unit} {self.done:,}/{self.total:,}"
        return ", ".join(part for part in (counted, *self.notes, self.rate, self.left) if part)


def seconds_left(done: int, left: int, seconds: float) -> float | None:
    """Seconds for what is left, at the rate at which `done` units took `seconds`; None while too
    little is done to tell.

    >>> seconds_left(1, 1999, 11.7), seconds_left(50, 1950, 100.0)
    (None, 3900.0)
    """
    if done < max(UNITS_FOR_FORECAST, SHARE_FOR_FORECAST * (done + left)):
        return None
    return seconds / done * left


class ProgressLine:
    """Shows snapshots of one stage, and messages that stay; with a `log`, as lines of it."""

    def __init__(self, log: logging.Logger | None = None) -> None:
        self._log = log
        self._terminal = sys.stderr.isatty() and log is None
        self._live: Live | None = None
        self._last_text, self._next_time, self._wait = "", 0.0, FIRST_LOG_SECONDS

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """Show where the stage is, if it is time; the last one always."""
        if self._terminal:
            self._bar().update(drawn(snapshot), refresh=last)
            return
        now, text = time.monotonic(), str(snapshot)
        if text == self._last_text or (now < self._next_time and not last):
            return
        if self._log is None:
            print(text, file=sys.stderr, flush=True)
        else:
            fields = {"event": "progress", "done": snapshot.done, "total": snapshot.total}
            self._log.info("%s", text, extra=fields)
        if self._last_text:
            self._wait = min(2 * self._wait, MOST_LOG_SECONDS)
        self._last_text, self._next_time = text, now + self._wait

    def say(self, message: str) -> None:
        """A message that stays."""
        if self._log is not None:
            self._log.warning("%s", message, extra={"event": "notice"})
        elif self._live is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._live.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as the last snapshot was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _bar(self) -> Live:
        if self._live is None:
            # Takes 50 ms to import, and logs need none of it.
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self._live


def drawn(snapshot: Snapshot) -> Any:
    """The bar with its numbers, a line for the notes, and one for each worker group."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        snapshot.what,
        ProgressBar(total=max(1, snapshot.total), completed=snapshot.done, width=BAR_WIDTH),
        f"{snapshot.done:,}/{snapshot.total:,} {snapshot.unit}",
        snapshot.rate,
        snapshot.left,
    )
    lines = [Text(f"  {', '.join(snapshot.notes)}", style="dim")] if snapshot.notes else []
    if len(snapshot.groups) > 1:
        lines += [Text(f"  {group}", style="dim") for group in snapshot.groups]
    return Group(bar, *lines)


def fleet_snapshot(progress: Progress) -> Snapshot:
    """Where a fleet is."""
    notes = []
    if progress.running:
        notes.append(f"{progress.running} running")
    elif not progress.complete and not progress.committed:
        notes.append("workers are starting")
    if progress.failed:
        notes.append(f"{progress.failed} FAILED")
    if progress.workers_retired:
        notes.append(f"{counted(progress.workers_retired, 'worker')} retired")
    if progress.deaths:
        notes.append(f"{progress.deaths} lost with their worker and trained again")
    if progress.drift:
        notes.append(f"{progress.drift} trained twice with different results")
    left = progress.total - progress.done - progress.failed
    return Snapshot(
        what="training",
        unit="trials",
        done=progress.done,
        total=progress.total,
        rate=f"{duration(1 / progress.rate)} per trial" if progress.rate else "",
        seconds_left=seconds_left(progress.committed, left, progress.committed / progress.rate)
        if progress.rate
        else None,
        notes=notes,
        groups=_groups(progress),
    )


def _groups(progress: Progress) -> list[str]:
    """A line for each worker group that has workers."""
    at_work = [group for group in progress.groups if group.workers]
    lines = [
        f"{group.name}: {counted(group.workers, 'worker')}, {group.running} running, "
        f"{counted(group.committed, 'trial')} done"
        for group in at_work[:GROUPS_LISTED]
    ]
    if len(at_work) > GROUPS_LISTED:
        lines.append(f"and {counted(len(at_work) - GROUPS_LISTED, 'more group')}")
    return lines
