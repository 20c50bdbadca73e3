"""Progress of long stages: one line that is rewritten, or a log line every half minute."""

from __future__ import annotations

import sys
import time

from raymem.fleet.trial_queue import Progress

LOG_SECONDS = 30.0


class ProgressLine:
    """Prints progress to stderr: one line, rewritten, on a terminal; every 30 s in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last_text, self._last_time = "", -LOG_SECONDS

    def show_text(self, text: str, *, last: bool) -> None:
        """Show a line, if it is time; the last one always."""
        now = time.monotonic()
        if self._terminal:
            if text != self._last_text:
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif now - self._last_time < LOG_SECONDS and not last:
            return
        elif text != self._last_text:
            print(text, file=sys.stderr, flush=True)
        self._last_text, self._last_time = text, now

    def say(self, message: str) -> None:
        """Print a message on a line of its own."""
        print(f"\r\033[K{message}" if self._terminal else message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line that is rewritten."""
        if self._terminal and self._last_text:
            print(file=sys.stderr, flush=True)


def describe(progress: Progress) -> str:
    """One line: done/total, what runs, what failed, rate, time left."""
    parts = [f"trials {progress.done:,}/{progress.total:,}"]
    if progress.running:
        parts.append(f"{progress.running} running")
    elif not progress.complete and not progress.committed:
        parts.append("workers are starting")
    if progress.failed:
        parts.append(f"{progress.failed} FAILED")
    if progress.workers_retired:
        workers = "worker" if progress.workers_retired == 1 else "workers"
        parts.append(f"{progress.workers_retired} {workers} retired")
    if progress.deaths:
        parts.append(f"{progress.deaths} lost with their worker and trained again")
    if progress.drift:
        parts.append(f"{progress.drift} trained twice with different results")
    if progress.rate:
        parts.append(f"{duration(1 / progress.rate)} per trial")
    if progress.seconds_left:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration as people write it.

    >>> duration(0.25), duration(59), duration(61), duration(7300), duration(200_000)
    ('0.25 s', '59 s', '1 min 1 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second} s"
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minute} min"
    return f"{hours // 24} d {hours % 24} h"
