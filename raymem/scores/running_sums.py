"""Sums over trials of what each trial measured of each example: the only running sums there are.

In:  values of one trial after the other. Out: counts, means, variances and standard errors.

Shapes: N examples. Arms are rows: 0 out, 1 in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymem.scores.estimates import Floats, ratio, sum_of_squared_deviations

# Whole trials; fractions of them only where parts are weighted.
Counts = NDArray[np.integer | np.floating]
OUT, IN = 0, 1


@dataclass(kw_only=True, eq=False)
class RunningSums:
    """Counts, sums and sums of squares of several measures of the same trials, shape [..., N].

    Sums are linear, so that merging is addition, trials can be taken out again, and folds can be
    reweighted. They are of what a measure exceeds its `origin` by: squares lose digits where a mean
    is large compared to the spread around it (the variance has an error of about 1e-16 times the
    squared distance of mean and origin). With one of the values as origin, equal values have a
    variance of exactly 0.

    >>> sums = RunningSums.zeros((2, 2), ["margin"], squares=["margin"], origin={"margin": [1, 2]})
    >>> sums.add(by_arm([True, False]), margin=[1.0, 2.0])
    >>> sums.add(by_arm([True, False]), margin=[3.0, 2.0])
    >>> sums.n.tolist()
    [[0, 2], [2, 0]]
    >>> sums.mean("margin")[IN].tolist(), sums.variance("margin")[IN].tolist()
    ([2.0, nan], [2.0, nan])
    """

    n: Counts
    """Trials counted."""
    total: dict[str, Floats]
    """Sum of each measure minus its origin; NaN if a counted value was."""
    squares: dict[str, Floats] = field(default_factory=dict)
    """Sum of squares of the same, of the measures whose variance is wanted."""
    origin: dict[str, Floats] = field(default_factory=dict)
    """[N] Of the measures that have one; else 0."""

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, ...],
        measures: Iterable[str],
        *,
        squares: Iterable[str] = (),
        origin: Mapping[str, ArrayLike] | None = None,
    ) -> RunningSums:
        """Empty sums; `squares` are the measures whose variance is wanted."""
        return cls(
            n=np.zeros(shape, np.int64),
            total={name: np.zeros(shape) for name in measures},
            squares={name: np.zeros(shape) for name in squares},
            origin={name: np.array(of, np.float64) for name, of in (origin or {}).items()},
        )

    def add(self, counted: NDArray[np.bool_], **values: ArrayLike) -> None:
        """Add one trial where it counts: bool [..., N]; `values` [N] of every measure."""
        self.n += counted
        for name, total in self.total.items():
            x = np.asarray(values[name], np.float64) - self.origin.get(name, 0.0)
            total += np.where(counted, x, 0)
            if name in self.squares:
                self.squares[name] += np.where(counted, x * x, 0)

    def __add__(self, other: RunningSums) -> RunningSums:
        """The sums over the trials of both, about the origin of these."""
        return self._combined(other, 1)

    def __sub__(self, other: RunningSums) -> RunningSums:
        """These sums without the trials of `other`, which must be among them."""
        return self._combined(other, -1)

    def _combined(self, other: RunningSums, sign: int) -> RunningSums:
        moved = other._about(self.origin)
        return RunningSums(
            n=self.n + sign * moved.n,
            total={name: of + sign * moved.total[name] for name, of in self.total.items()},
            squares={name: of + sign * moved.squares[name] for name, of in self.squares.items()},
            origin=self.origin,
        )

    def _about(self, origin: dict[str, Floats]) -> RunningSums:
        """The same values' sums about another origin."""
        total, squares = dict(self.total), dict(self.squares)
        for name in origin.keys() | self.origin.keys():
            shift = self.origin.get(name, np.zeros(())) - origin.get(name, np.zeros(()))
            if shift.any():
                total[name] = self.total[name] + self.n * shift
                if name in squares:
                    squares[name] = squares[name] + shift * (self.total[name] + total[name])
        return RunningSums(n=self.n, total=total, squares=squares, origin=origin)

    def merged(self, weights: ArrayLike) -> RunningSums:
        """The sums over the first axis, whose parts count `weights` times."""
        w = np.asarray(weights, np.float64)
        return RunningSums(
            n=np.tensordot(w, self.n, 1),
            total={name: np.tensordot(w, of, 1) for name, of in self.total.items()},
            squares={name: np.tensordot(w, of, 1) for name, of in self.squares.items()},
            origin=self.origin,
        )

    def at(self, rows: NDArray[np.int64]) -> RunningSums:
        """The sums of some examples."""
        return RunningSums(
            n=self.n[..., rows],
            total={name: of[..., rows] for name, of in self.total.items()},
            squares={name: of[..., rows] for name, of in self.squares.items()},
            origin={name: of[rows] for name, of in self.origin.items()},
        )

    def mean(self, name: str) -> Floats:
        """Mean over trials; NaN without any."""
        return ratio(self.total[name], self.n) + self.origin.get(name, 0.0)

    def squared_deviations(self, name: str) -> Floats:
        """Sum of squared deviations from the mean; NaN without trials."""
        return sum_of_squared_deviations(self.total[name], self.squares[name], self.n)

    def variance(self, name: str) -> Floats:
        """Unbiased variance over trials; NaN with fewer than two."""
        return ratio(self.squared_deviations(name), self.n - 1)

    def stderr(self, name: str) -> Floats:
        """Standard error of the mean; NaN with fewer than two trials."""
        found: Floats = np.sqrt(ratio(self.squared_deviations(name), self.n * (self.n - 1)))
        return found


def by_arm(inside: ArrayLike) -> NDArray[np.bool_]:
    """The trial's arm of each example: bool [2, N], rows out and in, of bool [N].

    >>> by_arm([True, False]).tolist()
    [[False, True], [True, False]]
    """
    mask = np.asarray(inside, bool)
    return np.stack([~mask, mask])
