"""When a fleet has enough trials: a target, looked at only at the ends of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from raymem.memorization.estimates import forecast_trials

# The first look needs two blocks; between looks a fleet grows by no more than this.
GROWTH = 1.5
Quantity = Literal["reliability", "ci-width"]


@dataclass(frozen=True, kw_only=True)
class Until:
    """Train until memorization is known so well.

    `reliability`: split-half reliability is `target` or more. `ci-width`: the 90th percentile of
    the widths of 95% intervals is `target` or less. Both concern the set as a whole: no example's
    own number decides, and at 50,000 examples an interval covers after stopping what it covers with
    a fixed number of trials (simulated in benchmarks/stopping.py).

    >>> Until.parse("reliability=0.98")
    Until(quantity='reliability', target=0.98)
    >>> Until.parse("ci-width=0.1").forecast(400, 0.131)
    687
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

    def reached(self, value: float) -> bool:
        """By a reliability, or a width; NaN reaches nothing."""
        return value >= self.target if self.quantity == "reliability" else value <= self.target

    def forecast(self, trials: int, value: float) -> int | None:
        """Trials at which `value` after `trials` will be the target; None if that says nothing.

        Reliability by Spearman and Brown's formula; a width falls as 1 over the root of trials.
        """
        if self.quantity == "reliability":
            needed = forecast_trials(trials, value, self.target)
        else:
            needed = trials * (value / self.target) ** 2
        return math.ceil(needed) if math.isfinite(needed) else None

    def next_look(self, trials: int, value: float, block: int, most: int) -> int:
        """At how many trials to look again: where the target is forecast, but at most half as many
        more, at least a block, and never more than `most`."""
        wanted = self.forecast(trials, value) or trials * 2
        wanted = min(max(wanted, trials + 1), math.ceil(trials * GROWTH))
        return min(most, math.ceil(wanted / block) * block)
