"""Vulnerability against memorization, each from its own half of the trials.

From the same trials both share the trials' noise: where nothing is memorized, as under strong
privacy, they still agree (0.69 at epsilon 0.5 on digits, with a reliability of -0.04).

Shapes: N training examples. Arms are rows: 0 out, 1 in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.membership.lira import IN, OUT, Floats, Sums, vulnerability
from raymem.memorization import correlation_interval, most_tied, ratio, spearman_ceiling

# Of a bootstrap over examples; of more examples than this a random part does.
REPLICATES, MOST_EXAMPLES = 200, 20_000


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's between vulnerability from one half of the trials and memorization from the other,
    the mean of both ways, over training examples."""

    value: float
    low: float
    """95%, from a bootstrap over examples."""
    high: float
    examples: int
    ceiling: float
    """The largest value that these numbers allow: ties in memorization keep it below 1."""
    tied: float
    """Share of the examples that have the most frequent memorization, mean of both halves."""
    tied_at: float
    """That value in the first half."""


class Half:
    """Sums of one half of the trials."""

    def __init__(self, first: Floats) -> None:
        self.margins = Sums(first)
        self.right = np.zeros((2, len(first)))

    def add(self, margins: Floats, inside: NDArray[np.bool_], correct: NDArray[np.bool_]) -> None:
        """Add one trial, [N] each."""
        self.margins.add(margins, inside)
        self.right[inside.astype(np.int64), np.arange(len(inside))] += correct

    @property
    def memorization(self) -> Floats:
        """Accuracy in minus accuracy out, [N]; NaN without trials in both arms."""
        accuracy = ratio(self.right, self.margins.n)
        difference: Floats = accuracy[IN] - accuracy[OUT]
        return difference

    @property
    def vulnerability(self) -> Floats:
        """d' of each example's margins in and out, [N], in standard deviations; NaN where it is not
        known."""
        return vulnerability(self.margins.moments())[0]


def crossed(one: Half, other: Half, *, seed: int = 0) -> RankCorrelation:
    """Of two halves of the trials. NaN if one of them does not vary.

    The interval is the bootstrap's standard deviation of Fisher's z around the estimate.
    """
    columns = np.stack(
        [one.vulnerability, other.memorization, other.vulnerability, one.memorization]
    )
    columns = columns[:, np.isfinite(columns).all(0)]
    n = columns.shape[1]
    value = _both_ways(columns)
    tied = [most_tied(columns[row]) for row in (3, 1)]
    about: dict[str, Any] = {
        "examples": n,
        "ceiling": (
            spearman_ceiling(columns[1], columns[0]) + spearman_ceiling(columns[3], columns[2])
        ) / 2,
        "tied": (tied[0][1] + tied[1][1]) / 2,
        "tied_at": tied[0][0],
    }  # fmt: skip
    if math.isnan(value):
        return RankCorrelation(value=value, low=value, high=value, **about)
    generator = np.random.default_rng(seed)
    size = min(n, MOST_EXAMPLES)
    drawn = [_both_ways(columns[:, generator.integers(n, size=size)]) for _ in range(REPLICATES)]
    low, high = correlation_interval(value, drawn, scale=math.sqrt(size / n))
    return RankCorrelation(value=value, low=low, high=high, **about)


def _both_ways(columns: Floats) -> float:
    """Mean of Spearman's of rows 0 and 1, and 2 and 3, of [4, N]."""
    if columns.shape[1] < 4 or (np.ptp(columns, axis=1) == 0).any():
        return math.nan
    there, back = (stats.spearmanr(x, y).statistic for x, y in (columns[:2], columns[2:]))
    return float(there + back) / 2
