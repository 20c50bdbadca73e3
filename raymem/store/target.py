"""What a study wants to have, and what failed on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raymem.store.trials import TrialKey


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a study wants to have: replaceable, not part of its identity."""

    trials: int
    """Trials at each epsilon."""
    epsilons: tuple[float, ...] = (math.inf,)
    """Privacy budgets; inf is not private. Rounded to the twelve digits that folders have."""

    def __post_init__(self) -> None:
        named = tuple(float(f"{epsilon:.12g}") for epsilon in self.epsilons)
        object.__setattr__(self, "epsilons", named)

    def wanted(self) -> list[TrialKey]:
        """All trials wanted; every epsilon of one subset before the next subset."""
        return [TrialKey(e, t) for t in range(self.trials) for e in self.epsilons]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A recorded failure of one attempt at one trial."""

    key: TrialKey
    attempt: int
    cause: str
