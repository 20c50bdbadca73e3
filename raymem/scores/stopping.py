"""When a fleet has enough trials: a target, checked only at the ends of blocks.

Shapes: N training examples; 2 arms, in and out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raymem.scores.estimates import difference_of_proportions, forecast_trials

# The first interim result needs two blocks; between two of them a fleet grows by no more than this.
GROWTH = 1.5
# Forecasts of widths end at so many times the trials.
FURTHEST = 1e6
Quantity = Literal["reliability", "ci-width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class InterimResult:
    """How well memorization (bit) is known at one moment."""

    trials: int
    reliability: float
    """Split-half reliability over whole blocks; NaN with fewer than two."""
    right: np.ndarray
    """[2, N] how many models with and without each example were right on it."""
    n: np.ndarray
    """[2, N] of how many."""

    def width(self, times: float = 1.0) -> float:
        """90th percentile of the widths of the 95% intervals; NaN without trials in both arms.

        `times` as many trials of the same accuracies would have it so.
        """
        right, n = self.right * times, self.n * times
        interval = difference_of_proportions(right[0], n[0], right[1], n[1])
        width = interval.high - interval.low
        width = width[np.isfinite(width)]
        return float(np.quantile(width, 0.9)) if len(width) else math.nan


@dataclass(frozen=True, kw_only=True)
class Until:
    """Train until memorization is known so well.

    `reliability`: split-half reliability is `target` or more. `ci-width`: the 90th percentile of
    the widths of 95% intervals is `target` or less. Both concern the set as a whole: no example's
    own number decides, and at 50,000 examples an interval covers after stopping what it covers with
    a fixed number of trials (simulated in benchmarks/stopping.py).

    >>> Until.parse("reliability=0.98")
    Until(quantity='reliability', target=0.98)
    >>> n = np.full((2, 9), 200)
    >>> seen = InterimResult(trials=400, reliability=0.9, right=n * [[1], [0.5]], n=n)
    >>> round(seen.width(), 2), Until.parse("ci-width=0.1").forecast(seen)
    (0.14, 777)
    """

    quantity: Quantity
    target: float

    def __post_init__(self) -> None:
        if self.quantity not in ("reliability", "ci-width") or not 0 < self.target < 1:
            raise ValueError(
                "a target is reliability=R or ci-width=W, both between 0 and 1, such as "
                f"reliability=0.98; got {self.quantity}={self.target}"
            )

    @classmethod
    def parse(cls, text: str) -> Until:
        """`reliability=0.98` or `ci-width=0.1`. Raises ValueError for what is neither."""
        name, _, value = text.partition("=")
        try:
            target = float(value)
        except ValueError:
            target = math.nan
        return cls(quantity=name.strip(), target=target)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.quantity}={self.target:g}"

    def value(self, seen: InterimResult) -> float:
        """Of the quantity, at an interim result."""
        return seen.reliability if self.quantity == "reliability" else seen.width()

    def reached(self, value: float) -> bool:
        """By a reliability, or a width; NaN reaches nothing."""
        return value >= self.target if self.quantity == "reliability" else value <= self.target

    def forecast(self, seen: InterimResult) -> int | None:
        """Trials at which the target will be reached; None if that is not known.

        Reliability by Spearman and Brown's formula. Width from every example's interval with more
        trials of its accuracies: those of examples that are always right narrow as 1 over trials,
        the others as 1 over their root.
        """
        if self.quantity == "reliability":
            needed = forecast_trials(seen.trials, seen.reliability, self.target)
        else:
            needed = seen.trials * self._times_for_width(seen)
        return math.ceil(needed) if math.isfinite(needed) else None

    def _times_for_width(self, seen: InterimResult) -> float:
        """How many times the trials have the width; inf if more than FURTHEST, NaN without one."""
        now = seen.width()
        if math.isnan(now):
            return math.nan
        if self.reached(now):
            return 1.0
        if not self.reached(seen.width(FURTHEST)):
            return math.inf
        low, high = 1.0, FURTHEST
        while high / low > 1.002:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.reached(seen.width(middle)) else (middle, high)
        return high

    def next_interim(self, seen: InterimResult, block: int, most: int) -> int:
        """At how many trials to ask again: where the target is forecast, but at most half as many
        more, at least a block, and never more than `most`."""
        wanted = self.forecast(seen) or seen.trials * 2
        wanted = min(max(wanted, seen.trials + 1), math.ceil(seen.trials * GROWTH))
        return min(most, math.ceil(wanted / block) * block)
