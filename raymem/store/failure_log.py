"""failures.json: attempts at trials that failed, grouped by cause, each with its first traceback.

The driver writes it; it goes on over all runs of a study. Causes are the same if their messages
differ in numbers only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from raymem.store.derived import Derived
from raymem.store.trials import TrialKey

# A study that fails in more ways has one cause.
CAUSES_KEPT = 100
TRIALS_KEPT = 20
CAUSE_CHARACTERS = 300
# How often known causes are counted in the store; new ones are written at once.
WRITE_SECONDS = 10.0
TRIAL = re.compile(r"^trial \d+( at epsilon \S+)? failed: ")
NUMBER = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FailureCause:
    """All failed attempts of one cause."""

    kind: str
    """What the attempt ended as: error, diverged, out-of-memory, worker-died, node-lost, ..."""
    cause: str
    """The first line of the first message."""
    times: int = 0
    trials: tuple[str, ...] = ()
    """Names of the first 20 trials that it stopped."""
    nodes: Mapping[str, int] = field(default_factory=dict)
    """Times by node."""
    first: str = ""
    """When it was first seen, in UTC."""
    last: str = ""
    trial: str = ""
    """The first trial that it stopped."""
    attempt: int = 1
    worker: str = ""
    """The first worker that it stopped."""
    node: str = ""
    """That worker's node."""
    traceback: str = ""
    """The first one; empty if the worker could not tell."""

    @property
    def group(self) -> tuple[str, str]:
        """What failures of the same cause have in common."""
        return self.kind, NUMBER.sub("#", self.cause)


def cause_of(message: str) -> str:
    """The first line of a failure's message, without the trial's name.

    >>> cause_of("trial 17 at epsilon 2 failed: ValueError: no such layer (net.py:3)\\nmore")
    'ValueError: no such layer (net.py:3)'
    """
    lines = TRIAL.sub("", message).strip().splitlines() or ["no message"]
    return lines[0][:CAUSE_CHARACTERS]


def failure_causes(store: Derived) -> list[FailureCause]:
    """What failures.json holds, the most frequent cause first."""
    note = store.note("failures") or {}
    names = {f.name for f in dataclasses.fields(FailureCause)}
    found = [
        FailureCause(**{k: v for k, v in row.items() if k in names} | {"trials": (*row["trials"],)})
        for row in note.get("causes", ())
    ]
    return sorted(found, key=lambda cause: -cause.times)


class FailureLog:
    """Counts failures by cause, and keeps them in the store.

    >>> store = Derived("memory://doctest-failures")
    >>> log = FailureLog(store)
    >>> for trial in (3, 4):
    ...     log.add(
    ...         TrialKey(float("inf"), trial), kind="error", attempt=1, worker="group-000/1",
    ...         node="a", message=f"trial {trial} failed: ValueError: {trial} rows", traceback="",
    ...     )
    >>> log.write()
    >>> [(cause.cause, cause.times, cause.trials) for cause in failure_causes(store)]
    [('ValueError: 3 rows', 2, ('eps-inf-000003', 'eps-inf-000004'))]
    """

    def __init__(
        self, store: Derived, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._store, self._now = store, now
        self._causes = {cause.group: cause for cause in failure_causes(store)}
        self._changed = self._new = False
        self._written = now()

    def add(
        self,
        key: TrialKey,
        *,
        kind: str,
        attempt: int,
        worker: str,
        node: str,
        message: str,
        traceback: str,
    ) -> None:
        """Count one failed attempt."""
        time = self._now().isoformat(timespec="seconds")
        made = FailureCause(
            kind=kind,
            cause=cause_of(message),
            first=time,
            trial=key.name,
            attempt=attempt,
            worker=worker,
            node=node,
            traceback=traceback,
        )
        known = self._causes.get(made.group)
        if known is None and len(self._causes) >= CAUSES_KEPT:
            return
        self._changed, self._new = True, self._new or known is None
        cause = known or made
        trials = cause.trials
        if key.name not in trials and len(trials) < TRIALS_KEPT:
            trials = (*trials, key.name)
        self._causes[made.group] = dataclasses.replace(
            cause,
            times=cause.times + 1,
            trials=trials,
            nodes={**cause.nodes, node: cause.nodes.get(node, 0) + 1} if node else cause.nodes,
            last=time,
            traceback=cause.traceback or traceback,
        )

    def write(self, *, last: bool = False) -> None:
        """Write what changed: new causes at once, counts now and then, all of it at the `last`."""
        waited = (self._now() - self._written).total_seconds() >= WRITE_SECONDS
        if not self._changed or not (self._new or waited or last):
            return
        causes: list[dict[str, Any]] = [dataclasses.asdict(c) for c in self._causes.values()]
        self._store.write_note("failures", {"causes": causes})
        self._changed = self._new = False
        self._written = self._now()
