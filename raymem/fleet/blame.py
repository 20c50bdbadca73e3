"""Who is to blame when a trial fails: the trial, its worker, its node, or the study.

A plain class without Ray and without I/O. The trial queue tells it which workers there are
(`expect`, `arrive`, `leave`) and what became of each trial (`committed`, `failed`). It asks who may
train what (`is_retired`, `is_suspended`, `may_train`), which trials to give up (`is_hopeless`), and
whether most workers fail (`why_all_fail`).

| a worker fails                                     | then                                       |
|----------------------------------------------------|--------------------------------------------|
| once or twice in a row                             | its trials are tried by other workers      |
| WORKER_FAILURES_ALLOWED trials in a row            | suspended until others have tried these    |
| the same, and another worker committed one of them | retired; its failures count no more        |
| the same, and proven workers fail on them too      | the trials are to blame; it goes on        |
| as do most, on most nodes, before the first commit | the study is to blame: the fleet ends      |
| as do most, FAILURES_IN_A_ROW without a commit     | the same                                   |

A worker is a place in a worker group: the process that takes the place of a dead one inherits its
failures. A new process may be all that a device needs, so when its worker group or another on its
node starts anew, a retired worker has one more chance; there, one failure is enough, and then its
slot stays empty. A node is retired when half of its workers are, two at least, or its only one for
the second time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from raymem.store import TrialKey

# Distinct trials that a worker may fail one after the other.
WORKER_FAILURES_ALLOWED = 3
# A trial is given up after so many failures, on as many workers if there are that many.
FAILURES_ALLOWED = 3
DIVERGENCES_ALLOWED = 3
# Two workers that diverge from the same seeds are no fault of either.
WORKERS_THAT_DIVERGE = 2
# Of all workers together, without a commit in between, when most of them fail.
FAILURES_IN_A_ROW = 20
STORE_FAILURES_IN_A_ROW = 3
# Times that a slot is filled.
CHANCES = 2
# A worker group that starts counts as working for as long as starting may take.
START_SECONDS = 300.0


class Place(NamedTuple):
    """A worker's place: its rank in a worker group."""

    worker_group: str
    rank: int

    def __str__(self) -> str:
        return f"{self.worker_group}/{self.rank}"


class Need(IntEnum):
    """How badly a worker needs a trial."""

    NONE = 0
    """There may be others."""
    IDLE = 1
    """There are no others for this worker."""
    ALL_IDLE = 2
    """Nor is any worker training."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a worker runs."""

    node: str = ""
    """The node's id; empty for a worker group that spans several, of which none can be blamed."""
    host: str = ""
    """What people call the node."""
    slot: str = ""
    """The device, or the slot, that the next process there will have too."""

    @property
    def name(self) -> str:
        """The node, for people; empty if it is not known."""
        return self.host or self.node


@dataclass
class _Record:
    """What is known of one worker."""

    location: Location
    allowed: int = WORKER_FAILURES_ALLOWED
    """Failures in a row that it may have."""
    streak: dict[TrialKey, str] = field(default_factory=dict)
    """Trials that failed here since this worker's last commit, with the last outcome of each."""
    failures: int = 0
    """Failed attempts since its last commit."""
    message: str = ""
    """Of its last failure."""
    proven: bool = False
    """It has committed a trial."""
    suspended: bool = False
    """Said to be suspended; cleared by a commit."""
    retired: bool = False


@dataclass(frozen=True)
class _Failure:
    place: Place
    outcome: str
    by_proven: bool
    """The worker had committed other trials."""


@dataclass
class _Node:
    retired_slots: list[str] = field(default_factory=list)
    """Of each worker that was retired there."""
    most_workers: int = 0
    """At once."""
    retired: bool = False

    def is_bad(self) -> bool:
        """Were several of its workers retired, or its only one twice?"""
        if self.most_workers <= 1:
            return len(self.retired_slots) >= CHANCES
        return len(set(self.retired_slots)) >= max(2, self.most_workers / 2)


def _is_failing(outcomes: list[str]) -> bool:
    """One divergence says nothing of a worker."""
    return len(outcomes) > 1 or _has_error(outcomes)


def _has_error(outcomes: list[str]) -> bool:
    return any(outcome != "diverged" for outcome in outcomes)


def _missed_the_store(outcomes: list[str]) -> bool:
    return outcomes[-1:] == ["store"]


class Blame:
    """Keeps what failed where, and decides who is to blame.

    >>> blame = Blame(clock=lambda: 0.0)
    >>> for rank in range(3):
    ...     blame.arrive("worker_group", rank)
    >>> trials = [TrialKey(float("inf"), number) for number in range(4)]
    >>> blame.committed(Place("worker_group", 1), trials[3])
    []
    >>> for trial in trials[:3]:
    ...     blame.failed(Place("worker_group", 0), trial, "error", "CUDA error")
    []
    []
    []
    >>> blame.is_suspended(Place("worker_group", 0)), blame.is_retired(Place("worker_group", 0))
    (True, False)
    >>> blame.committed(Place("worker_group", 1), trials[0]) == trials[1:3]
    True
    >>> blame.is_retired(Place("worker_group", 0))
    True
    """

    def __init__(
        self, clock: Callable[[], float], divergences: Mapping[TrialKey, int] | None = None
    ) -> None:
        self._clock = clock
        self._divergences_before = dict(divergences or {})
        self._records: dict[Place, _Record] = {}
        self._nodes: defaultdict[str, _Node] = defaultdict(_Node)
        self._expected: dict[str, tuple[int, float]] = {}
        self._failures: defaultdict[TrialKey, list[_Failure]] = defaultdict(list)
        self._committed: set[TrialKey] = set()
        self._in_a_row = 0
        self.notices: list[str] = []
        """What the user should know: each worker and node that is suspended or retired."""
        self.workers_retired = 0

    # Which workers there are

    def expect(self, worker_group: str, workers: int) -> None:
        """A worker group starts: until its workers arrive, they count as workers that do not
        fail."""
        self._expected[worker_group] = (workers, self._clock() + START_SECONDS)

    def arrive(self, worker_group: str, rank: int, location: Location | None = None) -> None:
        """A worker starts, maybe in the place of a dead one."""
        place, location = (
            Place(worker_group, rank),
            location or Location(node=worker_group, slot=str(rank)),
        )
        before = self._records.get(place)
        if before is not None and not before.retired:
            return
        self._records.pop(place, None)
        record = _Record(location)
        if location.node:
            node = self._nodes[location.node]
            chances_had = node.retired_slots.count(location.slot)
            if chances_had:
                record.allowed = 1
            # Where no other worker is left, a doubtful one is better than none.
            record.retired = chances_had >= CHANCES and any(self._working())
            here = sum(other.location.node == location.node for other in self._records.values())
            node.most_workers = max(node.most_workers, here + 1)
        self._records[place] = record

    def leave(self, worker_group: str) -> None:
        """A worker group is gone."""
        self._expected.pop(worker_group, None)
        for place in [place for place in self._records if place.worker_group == worker_group]:
            del self._records[place]

    def _working(self) -> Iterator[tuple[Place, _Record]]:
        for place, record in self._records.items():
            if not record.retired and not self._nodes[record.location.node].retired:
                yield place, record

    def _starting(self) -> list[int]:
        """Workers that have not arrived, of each worker group that starts."""
        if not self._expected:
            return []
        now = self._clock()
        arrived = Counter(place.worker_group for place in self._records)
        self._expected = {
            worker_group: (workers, until)
            for worker_group, (workers, until) in self._expected.items()
            if now < until and arrived[worker_group] < workers
        }
        return [
            workers - arrived[worker_group] for worker_group, (workers, _) in self._expected.items()
        ]

    # What became of trials

    def committed(self, place: Place | None, trial: TrialKey) -> list[TrialKey]:
        """A trial is done. Where others failed on it, they are to blame.

        Returns the trials of which failures count no more, because their worker was retired.
        """
        self._committed.add(trial)
        self._failures.pop(trial, None)
        self._in_a_row = 0
        record = None if place is None else self._records.get(place)
        if record is not None:
            record.streak, record.failures, record.proven = {}, 0, True
            record.suspended, record.allowed = False, WORKER_FAILURES_ALLOWED
        return self._judge([place for place, record in self._working() if record.streak])

    def failed(self, place: Place, trial: TrialKey, outcome: str, message: str) -> list[TrialKey]:
        """A trial failed on a worker. Returns what `committed` returns."""
        record = self._records.get(place)
        if record is None:
            return []
        self._in_a_row += 1
        record.streak.pop(trial, None)
        record.streak[trial] = outcome
        record.failures += 1
        record.message = message
        self._failures[trial].append(_Failure(place, outcome, record.proven))
        return self._judge([place])

    def divergences(self, trial: TrialKey) -> int:
        """How often it diverged, on workers that are not retired, or before this run."""
        here = sum(failure.outcome == "diverged" for failure in self._failures.get(trial, ()))
        return self._divergences_before.get(trial, 0) + here

    # Decisions

    def is_retired(self, place: Place) -> bool:
        """Is this worker, or its node, never to get a trial again?"""
        record = self._records.get(place)
        return record is not None and (record.retired or self._nodes[record.location.node].retired)

    def is_suspended(self, place: Place) -> bool:
        """Must this worker wait until others have tried what it failed on?"""
        record = self._records.get(place)
        return record is not None and self._fails_too_often(place, record) and not self._most_fail()

    def may_train(self, place: Place, trial: TrialKey, need: Need = Need.NONE) -> bool:
        """Should this worker train the trial? Not where it failed before, if others are left.

        A trial that failed is tried best by a worker that has proven that it can train. Without
        one, no more than FAILURES_ALLOWED others try it, else a single trial could make most
        workers fail before the first commit. Only if all are idle does anybody.
        """
        failures = self._failures.get(trial)
        if not failures:
            return True
        times = Counter(failure.place for failure in failures)
        record = self._records.get(place)
        proven = record is not None and record.proven
        if need == Need.NONE:
            return proven and not times[place]
        if times[place] < FAILURES_ALLOWED and (
            proven or times[place] or len(times) < FAILURES_ALLOWED
        ):
            return True
        others = [times[other] for other, _ in self._able() if other != place]
        least = min([*others, *([0] if self._starting() else [])], default=times[place])
        return (proven or need == Need.ALL_IDLE) and times[place] <= least

    def is_hopeless(self, trial: TrialKey) -> bool:
        """Did the trial fail so often, on so many workers, that it is to blame itself?

        These must be workers that have proven that they can train, or most of all workers.
        """
        failures = self._failures.get(trial)
        if not failures:
            return False
        diverges = self.divergences(trial) >= DIVERGENCES_ALLOWED
        others = sum(failure.outcome != "diverged" for failure in failures)
        if not diverges and others < FAILURES_ALLOWED:
            return False
        there = sum(1 for _ in self._working()) + sum(self._starting())
        proven = {failure.place for failure in failures if failure.by_proven}
        # What failed otherwise on another worker says nothing of divergence.
        where = {f.place for f in failures if f.by_proven and f.outcome == "diverged"}
        return (
            (diverges and len(where) >= min(WORKERS_THAT_DIVERGE, there))
            or len(proven) >= min(FAILURES_ALLOWED, there)
            or len({failure.place for failure in failures}) > there / 2
        )

    def why_all_fail(self, outcome: str, message: str) -> tuple[str, str] | None:
        """Kind and message of what ends the fleet, after a failure; None while it can go on."""
        kind = "store" if outcome == "store" else "error"
        if not self._committed and outcome != "diverged" and self._most_fail(_has_error):
            return kind, message
        many = self._in_a_row >= STORE_FAILURES_IN_A_ROW
        if kind == "store" and many and self._most_fail(_missed_the_store):
            return kind, message
        if self._in_a_row >= FAILURES_IN_A_ROW and self._most_fail():
            return "error", f"{self._in_a_row} trials in a row failed, the last because: {message}"
        return None

    def is_worker_group_retired(self, worker_group: str) -> bool:
        """Has the worker group workers, and are all of them retired?"""
        places = [place for place in self._records if place.worker_group == worker_group]
        return bool(places) and all(self.is_retired(place) for place in places)

    @property
    def retired_nodes(self) -> tuple[str, ...]:
        """The nodes that get no worker group any more."""
        return tuple(name for name, node in self._nodes.items() if node.retired)

    # Inside

    def _most_fail(self, fails: Callable[[list[str]], bool] = _is_failing) -> bool:
        """Do most workers fail, on most nodes, of those at work or starting?

        Whether a worker `fails`, the outcomes say that it had since its last commit.
        """
        nodes: defaultdict[str, list[bool]] = defaultdict(list)
        for place, record in self._working():
            nodes[record.location.node or place.worker_group].append(
                fails(list(record.streak.values()))
            )
        starting = self._starting()
        failing, there = sum(map(sum, nodes.values())), sum(map(len, nodes.values()))
        failing_nodes = sum(sum(node) >= len(node) / 2 for node in nodes.values())
        return (
            failing > (there + sum(starting)) / 2
            and failing_nodes > (len(nodes) + len(starting)) / 2
        )

    def _able(self) -> Iterator[tuple[Place, _Record]]:
        """Workers that may be leased trials now."""
        most_fail = self._most_fail()
        for place, record in self._working():
            if most_fail or not self._fails_too_often(place, record):
                yield place, record

    def _fails_too_often(self, place: Place, record: _Record) -> bool:
        if len(record.streak) < record.allowed:
            return False
        against = sum(not self._is_excused(place, trial) for trial in record.streak)
        return against >= record.allowed

    def _is_excused(self, place: Place, trial: TrialKey) -> bool:
        """Did the trial fail on another worker too, one that has proven that it can train?"""
        return trial not in self._committed and any(
            failure.by_proven and failure.place != place
            for failure in self._failures.get(trial, ())
        )

    def _judge(self, places: list[Place]) -> list[TrialKey]:
        """Suspend or retire workers; returns the trials of which failures count no more."""
        freed: list[TrialKey] = []
        for place in places:
            record = self._records[place]
            if self.is_retired(place) or not self.is_suspended(place):
                continue
            if any(trial in self._committed for trial in record.streak):
                freed += self._retire(place, record)
            elif not record.suspended:
                record.suspended = True
                self._note(place, record, "waits", "on trials that other workers try next")
        return freed

    def _retire(self, place: Place, record: _Record) -> list[TrialKey]:
        record.retired = True
        self.workers_retired += 1
        self._note(place, record, "is retired", "where other workers succeed")
        gone, node = {place}, self._nodes[record.location.node]
        if record.location.node:
            node.retired_slots.append(record.location.slot)
            if node.is_bad() and self._others_work(record.location.node):
                node.retired = True
                self.notices.append(
                    f"node {record.location.name} is retired: workers on it failed "
                    f"{len(node.retired_slots)} times where others succeed; check its devices, "
                    "disk and network"
                )
                gone |= {
                    p for p, r in self._records.items() if r.location.node == record.location.node
                }
        return self._forget(gone)

    def _others_work(self, node: str) -> bool:
        return any(
            record.location.node != node and not _is_failing(list(record.streak.values()))
            for _, record in self._working()
        )

    def _forget(self, places: set[Place]) -> list[TrialKey]:
        """Failures of these workers are not held against the trials, which are returned."""
        freed = []
        for trial, failures in self._failures.items():
            left = [failure for failure in failures if failure.place not in places]
            if len(left) < len(failures):
                self._failures[trial] = left
                freed.append(trial)
        return freed

    def _note(self, place: Place, record: _Record, what: str, where: str) -> None:
        slot = f" ({record.location.slot})" if record.location.slot else ""
        host = record.location.name
        times = "once" if record.failures == 1 else f"{record.failures} times in a row"
        self.notices.append(
            f"worker {place}{slot}{f' on node {host}' if host else ''} {what}: it failed {times} "
            f"{where}; last cause: {record.message}"
        )
