"""RMIA on arrays: is a model surer of an example, beside reference models, than of others?

In:  a target model's margins, and what reference models say of the same examples. Out: scores, high
     for members.

Zarifzadeh, Liu & Shokri 2024, "Low-Cost High-Power Membership Inference Attacks": with p(x) a
model's probability of the true class and Pr(x) its mean over models, an example's score is the
share of the population z with

    p(x) / Pr(x)  >=  gamma p(z) / Pr(z),        gamma = 1 here.

Within one target model this has the order of p(x) / Pr(x) alone, whatever gamma; the population
puts target models on one scale.

Shapes: N training examples, Z of them in the population. Arms are rows: 0 out, 1 in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from raymem.scores.estimates import Floats
from raymem.scores.lira import Moments
from raymem.scores.running_sums import OUT

# With so many, a false-positive rate of 0.1% is ten of them.
POPULATION = 10_000
# Of the authors' tool (privacy_meter); in the paper it is tuned for each data set.
OFFLINE_A = 0.3


def population(N: int, size: int = POPULATION, *, seed: int = 0) -> NDArray[np.int64]:
    """Z = min(N, size) of N examples, drawn at random without replacement: the same every time.

    >>> population(5).tolist(), len(population(100, 10))
    ([0, 1, 2, 3, 4], 10)
    """
    drawn = np.random.default_rng(seed).choice(N, min(N, size), replace=False)
    return np.sort(drawn).astype(np.int64)


def online(margins: ArrayLike, others: Moments, sample: ArrayLike) -> Floats:
    """Scores where Pr(x) is the mean of both arms' mean probabilities, [N], 0..1.

    `sample` [Z] are the positions of the population. NaN where an arm is empty. Raises ValueError
    if that is so for all of the population.

    >>> from raymem.scores.lira import add_margins, margin_sums
    >>> others = margin_sums([0.0, 0.0])
    >>> for margin, inside in [(2.0, True), (-2.0, False)]:
    ...     add_margins(others, [margin, margin], [inside, inside])
    >>> online([1.0, -1.0], Moments.of(others), [0, 1]).tolist()
    [1.0, 0.5]
    """
    return _share_below(margins, others.p_true.mean(0), sample)


def offline(
    margins: ArrayLike, others: Moments, sample: ArrayLike, *, a: float = OFFLINE_A
) -> Floats:
    """Scores from out-models alone, [N], 0..1; NaN where there is none.

    The mean of in-models is taken to be a Pr_out(x) + 1 - a, so that Pr(x) = ((1 + a) Pr_out(x) + 1
    - a) / 2. a = 1 says that training on an example changes nothing, a = 0 that models which saw it
    are sure of it. Raises ValueError if `a` is not in 0..1, and as `online`.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a must be between 0 and 1, got {a}")
    return _share_below(margins, ((1 + a) * others.p_true[OUT] + (1 - a)) / 2, sample)


def _share_below(margins: ArrayLike, average: Floats, sample: ArrayLike) -> Floats:
    """The share of the population with p / average at or below that of each example."""
    # An average below the least double is 0, and its logarithm not finite.
    floor = np.finfo(np.float64).tiny
    log_ratio = special.log_expit(np.asarray(margins, np.float64)) - np.log(
        np.maximum(average, floor)
    )
    of_sample = log_ratio[np.asarray(sample)]
    of_sample = np.sort(of_sample[~np.isnan(of_sample)])
    if not len(of_sample):
        raise ValueError("no example of the population has the reference models that it needs")
    share = np.searchsorted(of_sample, log_ratio, side="right") / len(of_sample)
    return np.where(np.isnan(log_ratio), np.nan, share)
