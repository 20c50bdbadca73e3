"""What the driver does twice a second while a fleet runs: shows it, records it, obeys signals."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import Protocol

from raymem.encoding import duration
from raymem.errors import StoreError
from raymem.fleet.long_stage import LongStage
from raymem.fleet.progress import Progress, TrialEvent, why_no_commit
from raymem.fleet.progress_line import fleet_snapshot
from raymem.fleet.trackers import TrackedRun
from raymem.fleet.trial_queue import COMMITTED, Lost
from raymem.store import FailureLog, Store

# In driver.json, for `raymem status`.
NOTICES_SHOWN = 10


class Watched(Protocol):
    """The trial queue as the driver sees it while it watches."""

    def stop(self) -> None:
        """See TrialQueue.stop."""

    def preempt(self) -> None:
        """See TrialQueue.preempt."""

    def take_lost(self) -> list[Lost]:
        """See TrialQueue.take_lost."""

    def take_events(self) -> list[TrialEvent]:
        """See TrialQueue.take_events."""


class FleetWatch:
    """Called with the trial queue and where it is, until the fleet is complete.

    `latest` is kept as driver.json is to have it. When nothing was committed for `stalled_seconds`,
    and each time that doubles, the user is told why.
    """

    def __init__(
        self,
        store: Store,
        stage: LongStage,
        latest: dict[str, object],
        *,
        stalled_seconds: float,
        tracked: TrackedRun | None = None,
    ) -> None:
        self._store, self._stage, self._latest, self._tracked = store, stage, latest, tracked
        self._failures = FailureLog(store)
        self._stalled_seconds = self._tell_after = stalled_seconds
        self._notices_said = 0
        self.stopping: str | None = None
        """stopped or preempted, if the fleet is to end before all is done."""

    def __call__(self, queue: Watched, progress: Progress) -> None:
        """Raises StoreHeldError if another driver took over."""
        self._latest.update(driver_record(progress, self._stalled_seconds))
        self._say(progress)
        self._record(queue, progress)
        self._stage.show(fleet_snapshot(progress), last=progress.complete)
        self._obey(queue)

    def _say(self, progress: Progress) -> None:
        for notice in progress.notices[self._notices_said :]:
            self._stage.line.say(notice)
        self._notices_said = len(progress.notices)
        quiet = progress.quiet_seconds
        if quiet < self._stalled_seconds:
            self._tell_after = self._stalled_seconds
        elif quiet >= self._tell_after and not progress.complete:
            self._tell_after *= 2
            self._stage.line.say(
                f"no trial committed for {duration(quiet)}: {why_no_commit(progress)}"
            )

    def _record(self, queue: Watched, progress: Progress) -> None:
        for lost in queue.take_lost():
            self._store.record_failure(lost.key, lost.attempt, lost.cause, lost.message)
        events = queue.take_events()
        if self._tracked is not None:
            self._tracked.add(events, progress)
        for event in events:
            if event.outcome not in COMMITTED:
                self._failures.add(
                    event.key,
                    kind=event.outcome,
                    attempt=event.attempt,
                    worker=event.worker,
                    node=event.node,
                    message=event.message,
                    traceback=event.report.traceback,
                )
        # An aid: a store that is full or away says so where it matters.
        with contextlib.suppress(StoreError):
            self._failures.write(last=progress.complete)

    def _obey(self, queue: Watched) -> None:
        if self._stage.preempted.is_set() and self.stopping != "preempted":
            self.stopping = "preempted"
            queue.preempt()
            self._stage.line.say(
                "time is nearly up: no new trials; those that are training are saved"
            )
        elif self._stage.stop_asked and self.stopping is None:
            self.stopping = "stopped"
            queue.stop()
            self._stage.line.say(
                "stopping: running trials finish first; press Ctrl-C again to stop now"
            )


def driver_record(progress: Progress, stalled_seconds: float) -> dict[str, object]:
    """Where a fleet is, JSON-ready, for driver.json."""
    p = progress
    quiet_since = datetime.now(UTC) - timedelta(seconds=p.quiet_seconds)
    return {
        "done": p.done,
        "total": p.total,
        "running": p.running,
        "failed": p.failed,
        "starting": p.starting,
        "rate": p.rate,
        "seconds_left": p.seconds_left,
        "outcomes": dict(p.outcomes),
        "groups": [group._asdict() for group in p.groups if group.workers],
        "quiet_since": quiet_since.isoformat(timespec="seconds"),
        "stalled_seconds": stalled_seconds,
        "why_no_commit": why_no_commit(p),
        "notices": list(p.notices[-NOTICES_SHOWN:]),
    }
