"""Trade-off curves: all that a mechanism promises, not one (epsilon, delta) alone.

f-differential privacy (Dong, Roth & Su 2022): if an event has probability q for models trained
without an example, its probability for models trained with it is at most `most_likely(q)`, and the
other way round. Each (epsilon, delta) that holds bounds the curve by two lines; a `Tradeoff` is the
lower envelope of such lines, so that more pairs make it tighter and never wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Above it a line says nothing: it is over 1 from e^-50 on.
LARGEST_EPSILON = 50.0
# Epsilons at which a Gaussian mechanism's curve is bounded, and up to how many of its mus.
GAUSSIAN_POINTS, GAUSSIAN_REACH = 24, 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Tradeoff:
    """The largest probability of an event with an example, given its probability without it.

    Concave, rising and piecewise linear; the same with the two exchanged (add/remove adjacency).

    >>> curve = Tradeoff.from_points([(1.0, 0.01)])
    >>> round(float(curve.most_likely(0.1)), 4)  # e * 0.1 + 0.01
    0.2818
    >>> round(curve.total_variation, 6) == round(math.tanh(0.5) + 0.02 / (1 + math.e), 6)
    True
    """

    q: Floats
    """Corners [V]: probabilities without the example, rising from 0 to 1."""
    p: Floats
    """Corners [V]: the largest probability with it, never falling, the last 1."""

    @classmethod
    def from_points(cls, points: Iterable[tuple[float, float]]) -> Tradeoff:
        """The curve of a mechanism that is (epsilon, delta)-DP for each of these pairs.

        p <= e^eps q + delta, and the same of the complementary event with p and q exchanged.
        """
        lines = [(0.0, 1.0)]
        for epsilon, delta in points:
            if epsilon <= LARGEST_EPSILON and delta < 1:
                shrink = math.exp(-epsilon)
                lines += [(math.exp(epsilon), delta), (shrink, 1 - (1 - delta) * shrink)]
        return cls._lower_envelope(lines)

    @classmethod
    def _lower_envelope(cls, lines: list[tuple[float, float]]) -> Tradeoff:
        slope, value = min(lines, key=lambda line: (line[1], line[0]))
        corners = [(0.0, value)]
        while flatter := [line for line in lines if line[0] < slope]:
            crossings = [((b - value) / (slope - a), a, b) for a, b in flatter]
            x, a, b = min(crossings)
            if x >= 1:
                break
            corners.append((x, a * x + b))
            slope, value = a, b
        corners.append((1.0, 1.0))
        q, p = np.array(corners).T
        return cls(q=q, p=np.maximum.accumulate(np.minimum(p, 1.0)))

    @classmethod
    def gaussian(cls, mu: float) -> Tradeoff:
        """Of the Gaussian mechanism with sensitivity `mu` standard deviations (mu-GDP), from above.

        >>> from scipy import stats
        >>> exact = stats.norm.cdf(stats.norm.ppf(0.1) + 1)
        >>> bool(0 <= Tradeoff.gaussian(1.0).most_likely(0.1) - exact < 1e-3)
        True
        """
        reach = mu * mu / 2 + GAUSSIAN_REACH * mu
        return cls.from_points(
            (float(e), gaussian_delta(mu, float(e)))
            for e in reach * np.linspace(0, 1, GAUSSIAN_POINTS) ** 2
        )

    def most_likely(self, q: Floats | float) -> Floats:
        """Largest probability with the example of an event of probability `q` without it."""
        return np.asarray(np.interp(q, self.q, self.p))

    def least_likely(self, p: Floats | float) -> Floats:
        """Smallest probability without the example of an event of probability `p` with it."""
        first = int(np.searchsorted(self.p, self.p[-1])) + 1  # where the curve ends in a plateau
        return np.asarray(np.interp(p, self.p[:first], self.q[:first]))

    @property
    def total_variation(self) -> float:
        """Largest difference of the two probabilities."""
        return float((self.p - self.q).max())

    @property
    def accuracy(self) -> float:
        """Largest probability of telling with from without, if both are equally likely before."""
        return (1 + self.total_variation) / 2

    @functools.cached_property
    def swapped(self) -> Tradeoff:
        """Of two models of which one has the example: which one is it?

        The product of the curve with itself. Every mechanism with this curve is a function of a
        variable that has one of two distributions, whose likelihood ratios are the slopes of the
        curve (Blackwell 1953); those of two models multiply.
        """
        dq, dp = np.diff(self.q, prepend=0.0), np.diff(self.p, prepend=0.0)
        q, p = np.outer(dq, dq).ravel(), np.outer(dp, dp).ravel()
        q, p = q[keep := (q > 0) | (p > 0)], p[keep]
        with np.errstate(divide="ignore"):
            order = np.argsort(-(np.log(p) - np.log(q)), kind="stable")
        q, p = (np.minimum(np.cumsum(mass[order]), 1.0) for mass in (q, p))
        q[-1] = p[-1] = 1.0
        return Tradeoff(q=np.concatenate([[0.0], q]), p=np.concatenate([[0.0], p]))

    @functools.cached_property
    def replaced(self) -> Tradeoff:
        """Where another example takes the example's place: both are neighbours of the common rest.

        The curve applied twice.
        """
        q = np.union1d(self.q, self.least_likely(self.q))
        p = np.maximum.accumulate(self.most_likely(self.most_likely(q)))
        return Tradeoff(q=q, p=p)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The delta of the Gaussian mechanism at `epsilon` (Balle & Wang 2018, Theorem 8).

    >>> round(gaussian_delta(1.0, 0.0), 4)  # the total variation, 2 Phi(1/2) - 1
    0.3829
    """
    from scipy import stats

    above = stats.norm.logcdf(-epsilon / mu - mu / 2)
    return float(stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + above))
