"""The target of a study, and the failures on the way there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raymem.encoding import epsilon_name
from raymem.errors import PlanError
from raymem.store.trials import TrialKey


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several parts of a study's trials, which clusters train apart and `merge` joins.

    Parts are whole blocks, dealt out in turn: each part is balanced by itself, and a larger target
    moves no trial from one part to another.

    >>> half = Part(number=1, of=2, block=20)
    >>> [trial for trial in (0, 19, 20, 39, 40) if half.has(trial)]
    [0, 19, 40]
    """

    number: int
    """From 1 to `of`."""
    of: int
    block: int
    """Number of trials in a block of the plan."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of or self.block < 1:
            raise PlanError(f"part must be K/N with K from 1 to N, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, trial: int) -> bool:
        """Is the trial in this part?"""
        return trial // self.block % self.of == self.number - 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """The trials a study is to have: replaceable, not part of its identity."""

    trials: int
    """Trials at each epsilon."""
    epsilons: tuple[float, ...] = (math.inf,)
    """Privacy budgets; inf is not private. Rounded to the twelve digits that folders have."""
    part: Part | None = None
    """Train only this part of the trials; None: all."""

    def __post_init__(self) -> None:
        named = tuple(float(epsilon_name(epsilon)) for epsilon in self.epsilons)
        object.__setattr__(self, "epsilons", named)

    def wanted(self) -> list[TrialKey]:
        """All trials of the target; every epsilon of one subset before the next subset."""
        mine = [t for t in range(self.trials) if self.part is None or self.part.has(t)]
        return [TrialKey(e, t) for t in mine for e in self.epsilons]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A recorded failure of one attempt at one trial."""

    key: TrialKey
    attempt: int
    cause: str
