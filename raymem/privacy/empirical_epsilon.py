"""What data say against a claimed epsilon: lower bounds on epsilon, each with its error rate.

None of them can prove privacy. What they can refute is limited by the number of trials.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
LARGEST_EPSILON = 32.0


def clopper_pearson(k: Floats, n: Floats, alpha: float) -> tuple[Floats, Floats]:
    """Lower and upper limits of a proportion, k of n: each fails with probability <= alpha / 2.

    >>> low, high = clopper_pearson(np.array([0.0]), np.array([10.0]), 0.05)
    >>> round(float(low[0]), 3), round(float(high[0]), 3)
    (0.0, 0.308)
    """
    k, n = np.asarray(k, np.float64), np.asarray(n, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        low = np.where(k > 0, stats.beta.ppf(alpha / 2, k, n - k + 1), 0.0)
        high = np.where(k < n, stats.beta.ppf(1 - alpha / 2, k + 1, n - k), 1.0)
    return np.asarray(low), np.asarray(high)


def lower_limit_of_difference(
    k_in: Floats, n_in: Floats, k_out: Floats, n_out: Floats, alpha: float
) -> Floats:
    """Lower limit of P_in - P_out that fails with probability at most alpha.

    Clopper and Pearson's limits of both, with alpha / 2 each: conservative, but valid at the small
    alpha of many examples, where approximations are not. NaN where an arm has no trial.
    """
    low, _ = clopper_pearson(k_in, n_in, alpha)
    _, high = clopper_pearson(k_out, n_out, alpha)
    return np.where((n_in > 0) & (n_out > 0), low - high, np.nan)


def certified_epsilon(
    k_in: Floats, n_in: Floats, k_out: Floats, n_out: Floats, *, delta: float, alpha: float
) -> Floats:
    """Lower bound on epsilon from how often an event was seen with and without an example.

    (eps, delta)-DP says P <= e^eps Q + delta for the event and its complement, and with P and Q
    exchanged; the largest of the four lower limits of eps is taken, all four valid together with
    probability 1 - alpha. At least 0.

    >>> ones, zeros = np.full(1, 1000.0), np.zeros(1)
    >>> round(float(certified_epsilon(ones, ones, zeros, ones, delta=1e-5, alpha=0.05)[0]), 1)
    5.4
    """
    found = np.zeros(np.broadcast(k_in, k_out).shape)
    p_low, p_high = clopper_pearson(k_in, n_in, alpha / 2)
    q_low, q_high = clopper_pearson(k_out, n_out, alpha / 2)
    for above, below in (
        (p_low, q_high), (1 - p_high, 1 - q_low), (q_low, p_high), (1 - q_high, 1 - p_low),
    ):  # fmt: skip
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.fmax(found, np.log(np.maximum(above - delta, 0) / below))
    return np.asarray(np.where((n_in > 0) & (n_out > 0), found, np.nan))


def one_run_p_value(
    correct: int, guesses: int, canaries: int, *, epsilon: float, delta: float
) -> float:
    """p-value of the number of correct guesses under (epsilon, delta)-DP: an upper bound.

    Each of `canaries` examples was in the training set with probability 1/2, independently; from
    the model, `guesses` were made which of them were in, or out (Steinke et al. 2023, Theorem 5.2
    and its proof: the number of correct guesses is stochastically dominated by Binomial(guesses,
    e^eps / (1 + e^eps)), up to a term in delta).
    """
    q = float(np.exp(-np.logaddexp(0, -epsilon)))
    base = float(stats.binom.sf(correct - 1, guesses, q))
    # What delta adds: mass of up to i correct guesses fewer, at most 2 m delta / i of it.
    below = stats.binom.pmf(correct - np.arange(1, correct + 1), guesses, q).cumsum()
    slope = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, base + 2 * canaries * delta * slope)


def one_run_epsilon(
    correct: int, guesses: int, canaries: int, *, delta: float, alpha: float = 0.05
) -> float:
    """Lower bound on epsilon, with confidence 1 - alpha, from guesses about canaries.

    The largest epsilon that `one_run_p_value` refutes at level alpha; 0 if none. Runs that are
    independent of each other may be added up.

    >>> round(one_run_epsilon(1000, 1000, 1000, delta=1e-5), 1)
    5.8
    """
    return largest_refuted(
        lambda e: one_run_p_value(correct, guesses, canaries, epsilon=e, delta=delta), alpha
    )


def largest_refuted(p_value: Callable[[float], float], alpha: float) -> float:
    """The largest epsilon whose p-value is at most alpha, to 0.001; 0 if none is.

    `p_value` rises with epsilon: then the answer is a lower bound on it at confidence 1 - alpha.
    """
    low, high = 0.0, 1.0
    if p_value(0.0) > alpha:
        return 0.0
    while p_value(high) <= alpha and high < LARGEST_EPSILON:
        low, high = high, 2 * high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= alpha else (low, middle)
    return low
