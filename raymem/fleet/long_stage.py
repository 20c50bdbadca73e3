"""What every long stage does while others work: show progress, obey Ctrl-C, notice a takeover.

    with DriverLock(files, progress=...) as lock, LongStage(lock) as stage:
        stage.collect(results, take, progress)

`collect` is the whole loop of a stage that takes results as they come (ingest, curvature). A stage
with its own loop (the fleet) calls `show` in it, and asks `stop_asked`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Self, TypeVar

from raymem.encoding import counted
from raymem.errors import RaymemError
from raymem.fleet.progress_line import ProgressLine, Snapshot, seconds_left
from raymem.store import DriverLock

Result = TypeVar("Result")


PREEMPTED = signal.SIGUSR1


class Stopped(RaymemError):
    """A signal stopped a long stage before the end; what is committed is kept."""

    exit_code = 5


class _StopNow(BaseException):
    """Raised by the signal, wherever the process is. Whatever a trial catches, it is not this."""


@dataclass(kw_only=True)
class StageProgress:
    """How far a stage is that goes through units of images, such as shards."""

    what: str
    """What is done: decoding, curvature."""
    unit: str
    """What is counted, in the plural."""
    total: int
    done_before: int = 0
    """Units that were done before this run."""
    done: int = 0
    """Units done by this run."""
    images: int = 0
    """Images done by this run."""
    bad: int = 0
    """Images that could not be read or scored."""
    started: float = field(default_factory=time.monotonic)
    first: tuple[float, int] | None = None
    """When this run's first units were done, and how many they were: workers started before."""

    @property
    def left(self) -> int:
        """Units that are not done."""
        return self.total - self.done_before - self.done

    @property
    def seconds(self) -> float:
        """Wall time of this run so far."""
        return time.monotonic() - self.started

    def add(self, *, done: int, images: int, bad: int) -> None:
        """Count what was done since the last call."""
        self.done += done
        self.images += images
        self.bad += bad
        if self.first is None and self.done:
            self.first = time.monotonic(), self.done

    @property
    def snapshot(self) -> Snapshot:
        """Units, images, rate, time left: at the rate since the first unit was done."""
        left = None
        if self.first is not None:
            since, before = self.first
            left = seconds_left(self.done - before, self.left, time.monotonic() - since)
        rate = self.images / self.seconds if self.images and self.seconds > 0 else 0.0
        return Snapshot(
            what=self.what,
            unit=self.unit,
            done=self.done_before + self.done,
            total=self.total,
            rate=f"{rate:,.1f} images/s" if rate else "",
            seconds_left=left,
            notes=[
                *([counted(self.images, "image")] if self.images else ["workers are starting"]),
                *([f"{self.bad:,} BAD"] if self.bad else []),
            ],
        )

    def __str__(self) -> str:
        return f"{self.what}: {self.snapshot}"


class LongStage:
    """A stage under way. Ctrl-C is counted while the `with` block runs.

    The second one, and SIGTERM, end the block at once. Raises Stopped then. SIGUSR1, which
    schedulers of batch jobs send before time is up, stops as the first does and sets `preempted`.
    """

    def __init__(self, lock: DriverLock, log: logging.Logger | None = None) -> None:
        self.lock, self.line = lock, ProgressLine(log)
        self.preempted = threading.Event()
        """Set if its machines are about to go, so that what is running is saved too."""
        self._asked = 0

    def __enter__(self) -> Self:
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other thread can do this
            for number in (signal.SIGINT, signal.SIGTERM, PREEMPTED):
                self._handlers[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.line.close()
        if isinstance(error, _StopNow):
            raise Stopped("stopped at once; run the same command again to go on") from None

    def _count(self, number: int, frame: FrameType | None) -> None:
        if number == PREEMPTED:
            self.preempted.set()
            self._asked = max(1, self._asked)
            return
        self._asked += 2 if number == signal.SIGTERM else 1
        if self._asked > 1:
            raise _StopNow

    @property
    def stop_asked(self) -> bool:
        """Whether a signal asked to stop."""
        return self._asked > 0

    def show(self, snapshot: Snapshot, *, last: bool) -> None:
        """Show where the stage is. Raises StoreHeldError if another driver took over."""
        self.line.show(snapshot, last=last)
        self.lock.check()

    def collect(
        self,
        results: Generator[Result],
        take: Callable[[Result], None],
        progress: StageProgress,
    ) -> None:
        """`take` every result as it comes, until there are no more or the user asks to stop.

        `take` adds to `progress`. Raises Stopped, StoreHeldError, and what `results` and `take` do.
        """
        # Closed at once, whatever happens, so that workers end with the run.
        with contextlib.closing(results) as found:
            for result in found:
                take(result)
                self.show(progress.snapshot, last=progress.left == 0)
                if self.stop_asked and progress.left:
                    raise Stopped(
                        f"stopped after {progress.total - progress.left:,} of {progress.total:,} "
                        f"{progress.unit}; run the same command again to go on"
                    )
