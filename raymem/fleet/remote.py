"""The ledger behind a Ray actor, called like the ledger itself."""

from __future__ import annotations

from typing import Any

import ray

from raymem.fleet.blame import Home
from raymem.fleet.ledger import Lease, Lost, Outcome, Progress
from raymem.store import TrialKey


class RemoteLedger:
    """A handle to the ledger actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def register(self, worker: str, lane: str, rank: int, home: Home | None = None) -> None:
        """See Ledger.register."""
        ray.get(self._actor.register.remote(worker, lane, rank, home))

    def lease(self, worker: str) -> Lease | None:
        """See Ledger.lease."""
        lease: Lease | None = ray.get(self._actor.lease.remote(worker))
        return lease

    def lease_group(self, worker: str, n: int) -> list[Lease] | None:
        """See Ledger.lease_group."""
        leases: list[Lease] | None = ray.get(self._actor.lease_group.remote(worker, n))
        return leases

    def beat(self, worker: str) -> bool:
        """See Ledger.beat."""
        return bool(ray.get(self._actor.beat.remote(worker)))

    def finish(self, worker: str, key: TrialKey, outcome: Outcome, message: str = "") -> None:
        """See Ledger.finish."""
        ray.get(self._actor.finish.remote(worker, key, outcome, message))

    def progress(self) -> Progress:
        """See Ledger.progress."""
        progress: Progress = ray.get(self._actor.progress.remote())
        return progress

    def take_lost(self) -> list[Lost]:
        """See Ledger.take_lost."""
        lost: list[Lost] = ray.get(self._actor.take_lost.remote())
        return lost

    def is_broken(self, lane: str) -> bool:
        """See Ledger.is_broken."""
        return bool(ray.get(self._actor.is_broken.remote(lane)))

    def expect(self, lane: str, workers: int) -> None:
        """See Ledger.expect. Does not wait for the actor, which may still be starting."""
        self._actor.expect.remote(lane, workers)

    def release_lane(self, lane: str) -> None:
        """See Ledger.release_lane."""
        ray.get(self._actor.release_lane.remote(lane))

    def drain(self, lane: str) -> None:
        """See Ledger.drain."""
        ray.get(self._actor.drain.remote(lane))

    def stop(self) -> None:
        """See Ledger.stop."""
        ray.get(self._actor.stop.remote())

    def preempt(self) -> None:
        """See Ledger.preempt."""
        ray.get(self._actor.preempt.remote())
