"""The trial queue behind a Ray actor, called like the trial queue itself."""

from __future__ import annotations

from typing import Any

import ray

from raymem.fleet.blame import Location
from raymem.fleet.progress import Capacity, Progress, Report, TrialEvent
from raymem.fleet.trial_queue import Lease, Lost, Outcome
from raymem.store import TrialKey


class RemoteQueue:
    """A handle to the trial queue actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def register(
        self, worker: str, worker_group: str, rank: int, location: Location | None = None
    ) -> None:
        """See TrialQueue.register."""
        ray.get(self._actor.register.remote(worker, worker_group, rank, location))

    def lease(self, worker: str) -> Lease | None:
        """See TrialQueue.lease."""
        lease: Lease | None = ray.get(self._actor.lease.remote(worker))
        return lease

    def lease_group(self, worker: str, n: int) -> list[Lease] | None:
        """See TrialQueue.lease_group."""
        leases: list[Lease] | None = ray.get(self._actor.lease_group.remote(worker, n))
        return leases

    def heartbeat(self, worker: str) -> bool:
        """See TrialQueue.heartbeat."""
        return bool(ray.get(self._actor.heartbeat.remote(worker)))

    def finish(
        self,
        worker: str,
        key: TrialKey,
        outcome: Outcome,
        message: str = "",
        report: Report | None = None,
    ) -> None:
        """See TrialQueue.finish."""
        ray.get(self._actor.finish.remote(worker, key, outcome, message, report))

    def progress(self) -> Progress:
        """See TrialQueue.progress."""
        progress: Progress = ray.get(self._actor.progress.remote())
        return progress

    def take_lost(self) -> list[Lost]:
        """See TrialQueue.take_lost."""
        lost: list[Lost] = ray.get(self._actor.take_lost.remote())
        return lost

    def take_events(self) -> list[TrialEvent]:
        """See TrialQueue.take_events."""
        events: list[TrialEvent] = ray.get(self._actor.take_events.remote())
        return events

    def is_broken(self, worker_group: str) -> bool:
        """See TrialQueue.is_broken."""
        return bool(ray.get(self._actor.is_broken.remote(worker_group)))

    def expect(self, worker_group: str, workers: int) -> None:
        """See TrialQueue.expect. Does not wait for the actor, which may still be starting."""
        self._actor.expect.remote(worker_group, workers)

    def set_capacity(self, capacity: Capacity) -> None:
        """See TrialQueue.set_capacity. Does not wait for the actor."""
        self._actor.set_capacity.remote(capacity)

    def release_worker_group(self, worker_group: str) -> None:
        """See TrialQueue.release_worker_group."""
        ray.get(self._actor.release_worker_group.remote(worker_group))

    def drain(self, worker_group: str) -> None:
        """See TrialQueue.drain."""
        ray.get(self._actor.drain.remote(worker_group))

    def stop(self) -> None:
        """See TrialQueue.stop."""
        ray.get(self._actor.stop.remote())

    def preempt(self) -> None:
        """See TrialQueue.preempt."""
        ray.get(self._actor.preempt.remote())
