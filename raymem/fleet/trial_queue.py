"""The queue of trials and their leases. Which trials are done, the store says.

A plain class without Ray and without I/O; a Ray actor of it serves a fleet, the serial engine and
simulations use it as it is. Workers call `register`, then `lease` and `finish` in turn, `heartbeat`
now and then; the driver calls `expect`, `progress`, `release_worker_group` and `stop`. Who is to
blame for failures, `raymem.fleet.blame` decides.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raymem.fleet.blame import DIVERGENCES_ALLOWED, Blame, Location, Need, Place
from raymem.fleet.progress import Capacity, GroupProgress, Progress, Report, TrialEvent
from raymem.store import Failure, TrialKey

Outcome = Literal[
    "committed", "duplicate", "drift",
    "diverged", "out-of-memory", "error", "store",
    "full", "mismatch",
]  # fmt: skip

Loss = Literal["worker-died", "node-lost", "no-heartbeat"]
LOSSES: dict[Loss, str] = {
    "worker-died": "its worker died in training: killed, out of the node's memory, or crashed",
    "node-lost": "its worker group ended in training: its node was lost, or its process ended",
    "no-heartbeat": "its worker sent no heartbeat: the node, the network or the process hangs",
}
COMMITTED = ("committed", "duplicate", "drift")
LEASE_SECONDS = 120.0
DEATHS_ALLOWED = 3
RESTARTS_WITHOUT_COMMIT = 6
POLL_SECONDS = 0.2
# Of all waiting workers together: a thousand of them would keep the trial queue busy with nothing.
POLLS_PER_SECOND = 200
# Older ones are dropped if nobody takes them.
EVENTS_KEPT = 10_000


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Leave to train one trial; or, without a key, the request to ask again in `wait` seconds."""

    key: TrialKey | None
    attempt: int = 1
    """Number of the attempt, from 1, as recorded if it fails."""
    seed_attempt: int = 1
    """The attempt whose seeds to use: a first retry has the same seeds."""
    wait: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A trial that this run gave up, whose worker could not record why."""

    key: TrialKey
    attempt: int
    cause: str
    message: str


@dataclass
class _Trial:
    attempts: int = 0
    deaths: int = 0


@dataclass
class _Worker:
    worker_group: str
    rank: int
    last_heartbeat: float
    host: str
    """What people call its node."""
    keys: set[TrialKey] = field(default_factory=set)
    """The trials that it is training, several at once in a group."""
    leased: float = 0.0
    """When it got them."""

    @property
    def place(self) -> Place:
        return Place(self.worker_group, self.rank)


@dataclass
class _WorkerGroup:
    node: str = ""
    restarts_without_commit: int = 0
    committed: int = 0
    failed: int = 0
    seen: set[int] = field(default_factory=set)
    draining: bool = False


class TrialQueue:
    """Leases the trials of `pending`, in their order, to whoever asks.

    `failures` are those recorded in the store: a trial that diverged too often is not tried again,
    one that failed otherwise is. `done_before` counts for progress only.

    >>> queue = TrialQueue([TrialKey(float("inf"), 0)])
    >>> queue.register("a", "worker_group", 0)
    >>> lease = queue.lease("a")
    >>> lease.key.trial, lease.attempt
    (0, 1)
    >>> queue.finish("a", lease.key, "committed")
    >>> queue.lease("a") is None, queue.progress().complete
    (True, True)
    """

    def __init__(
        self,
        pending: Iterable[TrialKey],
        *,
        failures: Sequence[Failure] = (),
        done_before: int = 0,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._lease_seconds = clock, lease_seconds
        self._trials: dict[TrialKey, _Trial] = {key: _Trial() for key in pending}
        diverged: Counter[TrialKey] = Counter()
        for failure in failures:
            trial = self._trials.get(failure.key)
            if trial is not None:
                trial.attempts = max(trial.attempts, failure.attempt)
                diverged[failure.key] += failure.cause == "diverged"
        self._given_up = {key for key, times in diverged.items() if times >= DIVERGENCES_ALLOWED}
        self._blame = Blame(clock, diverged)
        self._pending = deque(key for key in self._trials if key not in self._given_up)
        self._workers: dict[str, _Worker] = {}
        self._worker_groups: dict[str, _WorkerGroup] = {}
        self._expected: dict[str, int] = {}
        self._done: set[TrialKey] = set()
        self._lost: list[Lost] = []
        self._done_before = done_before
        self._drift = self._deaths = 0
        self._events: deque[TrialEvent] = deque(maxlen=EVENTS_KEPT)
        self._outcomes: Counter[str] = Counter()
        self._failures_since_commit, self._last_failure = 0, ""
        self._trained, self._trained_seconds, self._device_seconds = 0, 0.0, 0.0
        self._capacity: Capacity | None = None
        self._first_lease: float | None = None
        self._last_commit = clock()
        self._stopped = self._preempted = False
        self._fatal: tuple[str, str] | None = None

    def register(
        self, worker: str, worker_group: str, rank: int, location: Location | None = None
    ) -> None:
        """A worker starts. Whoever had its place in the worker group before is dead.

        Without a `location`, the worker group is a node, and the rank the slot there.
        """
        state = self._worker_groups.setdefault(worker_group, _WorkerGroup())
        if rank in state.seen:
            state.restarts_without_commit += rank == min(state.seen)
            self._remove(worker_group, rank, "worker-died")
        state.seen.add(rank)
        location = location or Location(node=worker_group, slot=str(rank))
        # Of a worker group that spans several nodes, no node is that of all.
        state.node = location.host if location.node else ""
        self._workers[worker] = _Worker(
            worker_group=worker_group,
            rank=rank,
            last_heartbeat=self._clock(),
            host=location.host,
        )
        self._blame.arrive(worker_group, rank, location)

    def lease(self, worker: str) -> Lease | None:
        """The next trial for this worker; None when it may exit.

        A retired worker may exit too: as long as others of its worker group go on, Ray Train starts
        no worker in its place.
        """
        leases = self.lease_group(worker, 1)
        return None if leases is None else leases[0]

    def lease_group(self, worker: str, n: int) -> list[Lease] | None:
        """Up to `n` trials that this worker trains together; None when it can exit.

        A worker gets its share of what is left, so that none is idle at the end. Without a trial
        for it, there is one lease without a key.
        """
        me = self._workers.get(worker)
        if me is None or self._stopped or self._fatal or self.is_broken(me.worker_group):
            return None
        if self._worker_groups[me.worker_group].draining or self._blame.is_retired(me.place):
            return None
        me.last_heartbeat = self._clock()
        self._expire()
        keys = [] if self._blame.is_suspended(me.place) else self._next_group(me.place, n)
        if not keys:
            waiting = self._pending or any(w.keys for w in self._workers.values())
            wait = max(POLL_SECONDS, len(self._workers) / POLLS_PER_SECOND)
            return [Lease(key=None, wait=wait)] if waiting else None
        me.keys, me.leased = set(keys), me.last_heartbeat
        if self._first_lease is None:
            self._first_lease = me.last_heartbeat
        return [self._leased(key) for key in keys]

    def _leased(self, key: TrialKey) -> Lease:
        trial = self._trials[key]
        trial.attempts += 1
        # A trial that diverged is trained again with the same seeds once, to tell a fault from
        # divergence, then with new ones.
        seed_attempt = max(1, self._blame.divergences(key))
        return Lease(key=key, attempt=trial.attempts, seed_attempt=seed_attempt)

    def heartbeat(self, worker: str) -> bool:
        """The worker lives; without this its lease runs out. True if its node is about to go."""
        me = self._workers.get(worker)
        if me is None:
            return False
        me.last_heartbeat = self._clock()
        return self._preempted or self._worker_groups[me.worker_group].draining

    def finish(
        self,
        worker: str,
        key: TrialKey,
        outcome: Outcome,
        message: str = "",
        report: Report | None = None,
    ) -> None:
        """A worker finished a trial. After its lease expired, only a commit counts."""
        me = self._workers.get(worker)
        in_time = me is not None and key in me.keys
        if me is not None and in_time:
            me.keys.discard(key)
            me.last_heartbeat = self._clock()
        first = key not in self._done
        if first and (in_time or outcome in COMMITTED):
            self._record(me, key, outcome, message, report)
        if me is not None and in_time and outcome in COMMITTED:
            self._trained += 1
            self._trained_seconds += me.last_heartbeat - me.leased
        if outcome in ("full", "mismatch"):
            self._fatal = (outcome, message)
        elif outcome in COMMITTED and first:
            if not in_time and key in self._pending:
                # It was queued again. No worker may be left to lease it and learn that it is done.
                self._pending.remove(key)
            self._commit(key, outcome, me)
        elif outcome not in COMMITTED and me is not None and in_time and first:
            self._fail(me.place, key, outcome, message)

    def _record(
        self,
        worker: _Worker | None,
        key: TrialKey,
        outcome: str,
        message: str,
        report: Report | None = None,
    ) -> None:
        """Keep what became of an attempt: counted here, told to the driver."""
        self._outcomes[outcome] += 1
        if outcome in COMMITTED:
            self._failures_since_commit = 0
        else:
            self._failures_since_commit += 1
            self._last_failure = message
            if worker is not None:
                self._worker_groups[worker.worker_group].failed += 1
        report = report or Report()
        self._device_seconds += report.measures.get("seconds", 0.0)
        self._events.append(
            TrialEvent(
                key=key,
                attempt=self._trials[key].attempts,
                outcome=outcome,
                worker="" if worker is None else str(worker.place),
                node="" if worker is None else worker.host,
                message=message,
                report=report,
            )
        )

    def expect(self, worker_group: str, workers: int) -> None:
        """A worker group starts: whether most workers fail is not decided without these, and groups
        leave trials for them."""
        self._expected[worker_group] = workers
        self._blame.expect(worker_group, workers)

    def set_capacity(self, capacity: Capacity) -> None:
        """What the cluster has for the fleet, which the driver sees."""
        self._capacity = capacity

    def release_worker_group(self, worker_group: str) -> None:
        """A worker group is lost with its node: its trials are queued again, without blame."""
        self._remove(worker_group, None, "node-lost")
        self._expected.pop(worker_group, None)
        self._blame.leave(worker_group)

    def drain(self, worker_group: str) -> None:
        """The worker group's node is about to go: it gets no new trial, and saves what it is
        training."""
        if worker_group in self._worker_groups:
            self._worker_groups[worker_group].draining = True

    def stop(self) -> None:
        """Lease nothing more; what is being trained may finish."""
        self._stopped = True

    def preempt(self) -> None:
        """All nodes are about to go: lease nothing more, and save what is being trained."""
        self._stopped = self._preempted = True

    def is_broken(self, worker_group: str) -> bool:
        """Did it restart repeatedly without a commit, or are all of its workers retired?"""
        state = self._worker_groups.get(worker_group)
        if state is None:
            return False
        restarts = state.restarts_without_commit
        return restarts >= RESTARTS_WITHOUT_COMMIT or self._blame.is_worker_group_retired(
            worker_group
        )

    def take_lost(self) -> list[Lost]:
        """Trials given up since the last call, for the driver to record."""
        lost, self._lost = self._lost, []
        return lost

    def take_events(self) -> list[TrialEvent]:
        """What became of attempts since the last call."""
        events = list(self._events)
        self._events.clear()
        return events

    def progress(self) -> Progress:
        """Where the fleet is."""
        self._expire()
        running = sum(len(worker.keys) for worker in self._workers.values())
        left = bool(self._pending) and not self._stopped and self._fatal is None
        elapsed = 0.0 if self._first_lease is None else self._last_commit - self._first_lease
        committed = len(self._done)
        return Progress(
            total=self._done_before + len(self._trials),
            done=self._done_before + committed,
            committed=committed,
            running=running,
            failed=len(self._given_up),
            drift=self._drift,
            deaths=self._deaths,
            rate=committed / elapsed if committed and elapsed > 0 else 0.0,
            complete=not left and running == 0,
            fatal=None if self._fatal is None else self._fatal[1],
            fatal_kind=None if self._fatal is None else self._fatal[0],
            workers_retired=self._blame.workers_retired,
            retired_nodes=self._blame.retired_nodes,
            notices=tuple(self._blame.notices),
            groups=tuple(self._groups()),
            starting=self._starting(),
            silent=sum(map(self._is_silent, self._workers.values())),
            outcomes=dict(self._outcomes),
            quiet_seconds=self._clock() - self._last_commit,
            trial_seconds=self._trained_seconds / self._trained if self._trained else 0.0,
            longest_seconds=max(
                (self._clock() - w.leased for w in self._workers.values() if w.keys), default=0.0
            ),
            failures_since_commit=self._failures_since_commit,
            last_failure=self._last_failure,
            device_seconds=self._device_seconds,
            capacity=self._capacity,
        )

    def _groups(self) -> Iterator[GroupProgress]:
        for name, state in sorted(self._worker_groups.items()):
            workers = [w for w in self._workers.values() if w.worker_group == name]
            yield GroupProgress(
                name=name,
                workers=len(workers),
                running=sum(len(worker.keys) for worker in workers),
                committed=state.committed,
                failed=state.failed,
                node=state.node,
            )

    def _next_group(self, place: Place, n: int) -> list[TrialKey]:
        """Trials to train together. Those whose worker died are tried in a smaller group, then
        alone, so that the one that kills is found by few more deaths."""
        all_idle = not any(worker.keys for worker in self._workers.values())
        first = self._next(place, Need if all_idle else (Need.NONE, Need.IDLE))
        if first is None:
            return []
        deaths = self._trials[first].deaths
        most = {0: n, 1: math.isqrt(n)}.get(deaths, 1)
        if most > 1:
            most = min(most, math.ceil((len(self._pending) + 1) / max(1, self._idle())))
        keys = [first]
        while len(keys) < most:
            key = self._next(place, (Need.NONE,), deaths)
            if key is None:
                break
            keys.append(key)
        return keys

    def _idle(self) -> int:
        """Workers that could train, and announced workers that have not registered yet."""
        return self._starting() + sum(
            not worker.keys
            and not self._worker_groups[worker.worker_group].draining
            and not self._blame.is_retired(worker.place)
            for worker in self._workers.values()
        )

    def _starting(self) -> int:
        here = Counter(worker.worker_group for worker in self._workers.values())
        return sum(
            max(0, number - here[worker_group]) for worker_group, number in self._expected.items()
        )

    def _is_silent(self, worker: _Worker) -> bool:
        return self._clock() - worker.last_heartbeat > self._lease_seconds

    def _next(
        self, place: Place, needs: Iterable[Need], deaths: int | None = None
    ) -> TrialKey | None:
        """The next pending trial, taken from the queue; with exactly `deaths`, if given."""
        # Trials whose worker died are suspects: one at a time per worker group, so that a trial
        # that kills its worker is told from those that only ran beside it.
        suspect_runs = self._deaths > 0 and any(
            w.worker_group == place.worker_group
            and any(self._trials[key].deaths > 0 for key in w.keys)
            for w in self._workers.values()
        )
        for need in needs:
            for n, key in enumerate(self._pending):
                died = self._trials[key].deaths
                if (suspect_runs and died > 0) or deaths not in (None, died):
                    continue
                if self._blame.may_train(place, key, need):
                    del self._pending[n]
                    return key
        return None

    def _commit(self, key: TrialKey, outcome: Outcome, worker: _Worker | None) -> None:
        self._done.add(key)
        self._given_up.discard(key)
        self._drift += outcome == "drift"
        self._last_commit = self._clock()
        if worker is not None:
            self._worker_groups[worker.worker_group].restarts_without_commit = 0
            self._worker_groups[worker.worker_group].committed += 1
        self._reconsider(self._blame.committed(None if worker is None else worker.place, key))

    def _fail(self, place: Place, key: TrialKey, outcome: Outcome, message: str) -> None:
        freed = self._blame.failed(place, key, outcome, message)
        self._fatal = self._fatal or self._blame.why_all_fail(outcome, message)
        if self._blame.is_hopeless(key):
            self._given_up.add(key)
            if outcome in ("error", "store"):
                self._lose(key, "error", message)
        else:
            # At the front: whether it fails elsewhere decides who is to blame.
            self._pending.appendleft(key)
        self._reconsider(freed)

    def _reconsider(self, freed: Iterable[TrialKey]) -> None:
        """Queue trials again that were given up because of a worker that is now retired."""
        for key in freed:
            died = self._trials[key].deaths >= DEATHS_ALLOWED
            if key in self._given_up and not died and not self._blame.is_hopeless(key):
                self._given_up.discard(key)
                self._pending.appendleft(key)

    def _remove(self, worker_group: str, rank: int | None, why: Loss) -> None:
        for name, worker in list(self._workers.items()):
            if worker.worker_group == worker_group and rank in (None, worker.rank):
                self._release(worker, why)
                del self._workers[name]

    def _release(self, worker: _Worker, why: Loss) -> None:
        """Queue its trials again. In a group that died, each trial is as suspect as one alone."""
        keys, worker.keys = sorted(worker.keys - self._done), set()
        blame = why == "worker-died"
        self._deaths += blame and bool(keys)
        for key in keys:
            self._record(worker, key, why, LOSSES[why])
            self._give_back(key, blame=blame)

    def _give_back(self, key: TrialKey, *, blame: bool) -> None:
        trial = self._trials[key]
        trial.attempts -= 1
        trial.deaths += blame
        if trial.deaths >= DEATHS_ALLOWED:
            self._given_up.add(key)
            trial.attempts += 1
            message = f"{key} was being trained {trial.deaths} times when its worker died"
            self._lose(key, "worker-died", message)
        else:
            self._pending.append(key)

    def _lose(self, key: TrialKey, cause: str, message: str) -> None:
        attempt = self._trials[key].attempts
        self._lost.append(Lost(key=key, attempt=attempt, cause=cause, message=message))

    def _expire(self) -> None:
        for worker in self._workers.values():
            if worker.keys and self._is_silent(worker):
                self._release(worker, "no-heartbeat")
