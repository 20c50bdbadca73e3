"""Upper bounds on memorization under differential privacy, each with what it assumes.

For one example i, let P be the probability that a model trained with it is right on it, Q without
it; memorization is P - Q. The same bounds hold for the probability the model gives the label, as
for anything in [0, 1] computed from the model, and for Q - P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raymem.plan import Kind
from raymem.privacy.mechanism import Mechanism

# A bound above this says nothing about a number that is at most 1.
VACUOUS_ABOVE = 0.99


def paper_bound(epsilon: float) -> float:
    """1 - e^-eps (Ravikumar et al. 2024, Theorem 5.4).

    From P <= e^eps Q: P - Q <= (1 - e^-eps) P. It assumes delta = 0, which DP-SGD does not have.

    >>> round(paper_bound(1.0), 3)
    0.632
    """
    return -math.expm1(-epsilon)


def honest_bound(epsilon: float, delta: float) -> float:
    """1 - e^-eps + e^-eps delta: the same from P <= e^eps Q + delta, which DP-SGD does have.

    It holds for certain, not "with probability 1 - delta".
    """
    return -math.expm1(-epsilon) + math.exp(-epsilon) * delta


def sharp_bound(epsilon: float, delta: float) -> float:
    """tanh(eps/2) + 2 delta / (1 + e^eps): the total variation distance of (eps, delta)-DP.

    Uses 1 - Q <= e^eps (1 - P) + delta beside P <= e^eps Q + delta; nothing smaller follows from
    (eps, delta) alone: the bound is attained by randomized response. Assumes that adding or
    removing one example is what is private (add/remove adjacency).

    >>> round(sharp_bound(1.0, 0.01), 6)
    0.467496
    """
    tail = math.exp(-epsilon)
    return math.tanh(epsilon / 2) + 2 * delta * tail / (1 + tail)


def fixed_size_bound(epsilon: float, delta: float) -> float:
    """1 - e^-eps + 2 e^-eps delta: where models without i have another example in its place.

    Of subsets of a fixed size, those with i are T + i and those without it are T + j, with j drawn
    from outside T. Both are neighbours of the common T: P <= 1 - e^-eps (1 - P_T - delta) and
    Q >= e^-eps (P_T - delta). Attained, like `sharp_bound`.
    """
    return -math.expm1(-epsilon) + 2 * math.exp(-epsilon) * delta


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One upper bound on the memorization of every example."""

    name: str
    """`paper`, `honest`, `sharp`, `fixed-size` or `total-variation`."""
    value: float
    """No example's memorization is above it, if its assumptions hold."""
    holds: bool
    """Does it follow from the mechanism, for subsets drawn as these are?"""
    assumes: str
    """What it follows from, in words."""

    @property
    def vacuous(self) -> bool:
        """Is it so near 1 that it says nothing?"""
        return self.value > VACUOUS_ABOVE


def bounds_on_memorization(mechanism: Mechanism, kind: Kind) -> list[Bound]:
    """All bounds for one mechanism and kind of subsets; none for a mechanism that is not private.

    Bernoulli, balanced and candidate-pool subsets: given whether i is in, the rest of the subset is
    distributed the same, so that models with and without i differ by i alone, and the bounds of
    add/remove adjacency hold for what the subset estimator estimates. In subsets of a fixed size
    another example takes i's place: there `fixed-size` holds, and twice the total variation.

    Every bound is of the epsilon that was spent, not of the one that was asked for.
    """
    if math.isinf(mechanism.epsilon):
        return []
    epsilon, delta = mechanism.spent_epsilon, mechanism.delta
    fixed = kind == "fixed-size"
    found = [
        Bound(
            name="paper",
            value=paper_bound(epsilon),
            holds=False,
            assumes="delta = 0, which no DP-SGD has",
        ),
        Bound(
            name="honest",
            value=honest_bound(epsilon, delta),
            holds=not fixed,
            assumes="(eps, delta)-DP for adding or removing one example",
        ),
        Bound(
            name="sharp",
            value=sharp_bound(epsilon, delta),
            holds=not fixed,
            assumes="(eps, delta)-DP for adding or removing one example, used in both directions",
        ),
        Bound(
            name="fixed-size",
            value=fixed_size_bound(epsilon, delta),
            holds=True,
            assumes="(eps, delta)-DP for adding or removing one example; another may replace it",
        ),
    ]
    if mechanism.total_variation is not None:
        found.append(
            Bound(
                name="total-variation",
                value=min(1.0, mechanism.total_variation * (2 if fixed else 1)),
                holds=True,
                assumes="Poisson-subsampled Gaussian steps, as the accountant composes them"
                + ("; twice, since another example replaces it" if fixed else ""),
            )
        )
    return found


def tightest(bounds: list[Bound]) -> Bound | None:
    """The smallest bound that holds."""
    return min((b for b in bounds if b.holds), key=lambda bound: bound.value, default=None)
