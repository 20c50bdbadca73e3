"""Where a fleet is, what became of its attempts, and why it commits nothing, if it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from raymem.encoding import counted, duration
from raymem.store import TrialKey

# Fewer failures than these may be bad luck.
FAILURES_THAT_TELL = 3
# A trial that takes this many times the mean may hang.
TIMES_THE_MEAN = 3.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker tells of an attempt beside its outcome."""

    traceback: str = ""
    """Of the exception, if it failed."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Accuracies and seconds of the trial, if it is committed."""


@dataclass(frozen=True, kw_only=True)
class TrialEvent:
    """What became of one attempt at a trial, for the driver's records."""

    key: TrialKey
    attempt: int
    outcome: str
    """As the worker said, or worker-died, node-lost, no-heartbeat."""
    worker: str
    """Its worker group and rank, group-003/5."""
    node: str
    """What people call its node; empty if it is not known."""
    message: str = ""
    report: Report = field(default_factory=Report)


class GroupProgress(NamedTuple):
    """Where one worker group is."""

    name: str
    workers: int
    running: int
    """Trials that its workers are training."""
    committed: int
    """Trials that they committed in this run."""
    failed: int = 0
    """Attempts that failed in this run."""
    node: str = ""
    """What people call its node; empty if it is not known, or there are several."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the cluster has for a fleet."""

    nodes: int
    """Nodes that are alive."""
    with_room: int
    """Nodes that are large enough for a worker, and neither retired nor about to go."""
    asked: int
    """Workers for which the autoscaler is asked for room."""
    need: str
    """What one trial takes, such as 1 CPUs and 1 GPUs."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a fleet is; counts are trials."""

    total: int
    """Wanted in all, also those done before this run."""
    done: int
    """Committed, in this run or before."""
    committed: int
    """Committed in this run."""
    running: int
    """Being trained."""
    failed: int
    """Given up in this run, or for good before."""
    drift: int
    """Trained twice with results that differ between hardware."""
    deaths: int
    """Times a trial's worker died."""
    rate: float
    """Trials committed per second, from the first lease to the last commit; 0 before that."""
    complete: bool
    """Nothing is left to do or being done."""
    fatal: str | None
    """Why the fleet cannot go on."""
    fatal_kind: str | None
    """error, store, full or mismatch."""
    workers_retired: int = 0
    """Workers that get no more trials, because they failed where others succeed."""
    retired_nodes: tuple[str, ...] = ()
    """Ids of the nodes that get no more workers."""
    notices: tuple[str, ...] = ()
    """What to tell the user of workers and nodes that fail; it only grows."""
    groups: tuple[GroupProgress, ...] = ()
    """Where each worker group is."""
    starting: int = 0
    """Workers that are announced and have not registered."""
    silent: int = 0
    """Workers without a heartbeat for as long as a lease lasts."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    """Attempts that ended in this run, by outcome."""
    quiet_seconds: float = 0.0
    """Since the last commit, or since the run began."""
    trial_seconds: float = 0.0
    """Mean time from lease to commit in this run; 0 before the first commit."""
    longest_seconds: float = 0.0
    """For which the longest running trial has been trained."""
    failures_since_commit: int = 0
    """Attempts that failed since the last commit."""
    last_failure: str = ""
    """Why the last attempt that failed did."""
    device_seconds: float = 0.0
    """That the trials committed in this run took on their devices."""
    capacity: Capacity | None = None
    """Of the cluster; None without one."""

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None if there is none yet."""
        left = self.total - self.done - self.failed
        return left / self.rate if self.rate > 0 else None

    @property
    def workers(self) -> int:
        """Registered workers."""
        return sum(group.workers for group in self.groups)


def by_node(groups: Sequence[GroupProgress]) -> list[GroupProgress]:
    """Worker groups summed over each node that has workers; a group that spans several, or whose
    node is not known, stays by itself.

    >>> at = [GroupProgress(f"group-{n}", 2, 1, 5, node="a") for n in range(2)]
    >>> by_node(at)[0].node, by_node(at)[0].workers, by_node(at)[0].committed
    ('a', 4, 10)
    """
    found: dict[str, GroupProgress] = {}
    for group in groups:
        if group.workers == 0:
            continue
        name = group.node or group.name
        before = found.get(name, GroupProgress(group.name, 0, 0, 0))
        found[name] = GroupProgress(
            before.name,
            before.workers + group.workers,
            before.running + group.running,
            before.committed + group.committed,
            before.failed + group.failed,
            group.node,
        )
    return [found[name] for name in sorted(found)]


def why_no_commit(progress: Progress) -> str:
    """In words: why no trial has been committed for a while.

    >>> why_no_commit(Progress(
    ...     total=9, done=1, committed=1, running=2, failed=0, drift=0, deaths=0, rate=0.1,
    ...     complete=False, fatal=None, fatal_kind=None, trial_seconds=600, longest_seconds=480,
    ...     groups=(GroupProgress("group-000", 2, 2, 1),),
    ... ))
    'trials take about 10 min 0 s, and the longest running one has trained for 8 min 0 s'
    """
    p = progress
    failed = f"the last because: {p.last_failure}" if p.failures_since_commit else ""
    if p.failures_since_commit >= max(FAILURES_THAT_TELL, p.workers / 2):
        return f"everything fails: {p.failures_since_commit} attempts in a row, {failed}"
    text = _no_workers(p) if p.workers == 0 else _with_workers(p)
    if failed:
        text += f"; {counted(p.failures_since_commit, 'attempt')} failed meanwhile, {failed}"
    return text


def _no_workers(p: Progress) -> str:
    if p.starting:
        return (
            f"no workers yet: {p.starting} are starting, which includes copying the data to their "
            "nodes"
        )
    if p.capacity is None:
        return "no workers"
    c = p.capacity
    if c.with_room:
        return f"no workers: {counted(c.with_room, 'node')} with room, a worker group is to start"
    retired = f", {len(p.retired_nodes)} are retired" if p.retired_nodes else ""
    asked = f"; the autoscaler is asked for room for {c.asked}" if c.asked else ""
    return (
        f"no workers, waiting for nodes: none of the cluster's {c.nodes} has {c.need} for a trial"
        f"{retired}{asked}; `ray status` says what is pending and why"
    )


def _with_workers(p: Progress) -> str:
    if p.silent > p.workers / 2:
        return (
            f"{p.silent} of {p.workers} workers send no heartbeat: their nodes are lost, or the "
            "network is"
        )
    if p.running == 0:
        return f"{counted(p.workers, 'worker')} and no trial in training: they wait for a trial"
    trained = f"the longest running one has trained for {duration(p.longest_seconds)}"
    if p.trial_seconds == 0:
        return (
            f"{counted(p.running, 'trial')} in training, none committed in this run, so that "
            f"nobody knows how long one takes; {trained}"
        )
    usual = f"trials take about {duration(p.trial_seconds)}, and {trained}"
    if p.longest_seconds > TIMES_THE_MEAN * p.trial_seconds:
        return f"{usual}: they may hang; look at their nodes, and end a worker that does nothing"
    return usual
