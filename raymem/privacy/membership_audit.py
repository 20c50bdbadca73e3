"""Two audits of a trade-off curve by membership: of one example by itself, and of many together.

Each counts how often membership was told right, and bounds from above the distribution of that
count for every mechanism with the curve, so that a p-value holds whatever the mechanism, the model
and the score. What is random is membership, given everything else:

* In a block of trials an example is in n_in of them, by a uniform permutation that is independent
  of all other examples. `rank_tail`: call the n_in trials with the highest scores "in".
* Of two trials of a block an example is in one and out of the other (or not: then it says nothing).
  Given that, which one is a fair coin, independent of the coins of all other examples: the design
  that one-run audits need (Steinke, Nasr & Jagielski 2023; Mahloujifar, Melis & Chaudhuri 2024),
  which ask for inclusion by independent coins. Inclusion in a single trial of a balanced block is
  one too, but not independent of that in the others. `guess_tail`: guess some of the coins.

Tails are arrays [n + 1]: an upper bound on the probability of k or more right, k = 0 to n.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

from raymem.privacy.empirical_epsilon import Floats
from raymem.privacy.tradeoff import Tradeoff

NEWTON_STEPS = 60
# Of the sum of a distribution that is made by Fourier transforms: no p-value is below it.
ROUNDING = 1e-13


def highest_are_in(scores: Floats, inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of the n_in trials with the highest score for an example, how many trained on it.

    scores, inside: [T, P] of one block. Returns [P]. Ties by the trial's number, which says nothing
    of membership.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(scores))[:, None], axis=0)
    return np.asarray((inside & (place < inside.sum(0))).sum(0))


@functools.lru_cache(maxsize=256)
def rank_tail(n_in: int, n_out: int, curve: Tradeoff) -> Floats:
    """Tail of `highest_are_in` for one example, under any mechanism with this curve.

    By Blackwell's theorem every trial's score is a function of a variable that is uniform on [0, 1]
    in its curve's coordinates: p of n_in trials, q of n_out, where a small one speaks for "in" and
    `curve` joins the two. The best guess, the smallest n_in, is right k times or more if fewer than
    n_in - k + 1 of the q are before the k-th smallest p, which is Beta(k, n_in - k + 1). The
    integral over it is exact: a polynomial on each piece of the curve.

    >>> nothing = Tradeoff.from_points([(0.0, 0.0)])
    >>> rank_tail(2, 2, nothing)[1:].round(4).tolist() == [round(5 / 6, 4), round(1 / 6, 4)]
    True
    """
    nodes, weights = np.polynomial.legendre.leggauss((n_in + n_out + 1) // 2)
    p = np.concatenate([[0.0], curve.p])
    q = np.concatenate([[curve.q[0]], curve.q])
    share = (nodes + 1) / 2
    width = np.diff(p)[:, None]
    x = p[:-1, None] + width * share
    y = q[:-1, None] + np.diff(q)[:, None] * share
    k = np.arange(1, n_in + 1)[:, None, None]
    density = stats.beta.pdf(x, k, n_in - k + 1) * stats.binom.cdf(n_in - k, n_out, y)
    tail = (density * width * weights / 2).sum((1, 2))
    return np.concatenate([[1.0], np.minimum(tail, 1.0)])


@functools.lru_cache(maxsize=256)
def guess_distribution(coins: int, guesses: int, curve: Tradeoff) -> Floats:
    """The largest distribution of the number of right guesses about fair coins of one run: [n + 1].

    Largest in the increasing convex order: E phi(right) is at most what it is here for every convex
    function that never falls, whichever `guesses` of the coins are chosen, and also if they share
    the mechanism's randomness, so that in unlucky moments all are told at once. `curve` bounds what
    one coin's side changes. Let p_j be the probability of j right guesses; to turn over a coin that
    is guessed right leaves j - 1, so that for every c (Mahloujifar et al. 2024, Theorem 9)

        sum_{j >= c} j p_j / coins <= curve(sum_{j >= c - 1} (guesses - j) p_j / coins).

    In terms of S(t) = E max(right - t, 0) this bounds S(c - 1) from above by a function that rises
    with S(c - 2) and S(c) and that no constant can be added to; so by the maximum principle no S
    exceeds that of the distribution which attains every inequality. It is found by Newton's method,
    each step of which takes a line above the curve for every c, and so is an upper bound itself.

    >>> response = Tradeoff.from_points([(1.0, 0.0)])  # randomized response attains all
    >>> exact = stats.binom.pmf(np.arange(10), 9, 1 / (1 + math.exp(-1)))
    >>> bool(np.allclose(guess_distribution(9, 9, response), exact))
    True
    """
    n, share = guesses, guesses / coins
    wide = np.diff(curve.q) > 0
    slopes = np.diff(curve.p)[wide] / np.diff(curve.q)[wide]
    starts = curve.q[:-1][wide]
    heights = (curve.p[:-1][wide] - slopes * starts) / share
    c = np.arange(1, n + 1)
    line = np.full(n, len(slopes) // 2)
    for _ in range(NEWTON_STEPS):
        slope = slopes[line]
        bands = np.zeros((3, n))  # of S(0), ..., S(n - 1)
        bands[0, 1:] = -(c - 1)[:-1]
        bands[1] = c + slope * (n - c + 2)
        bands[1, 0] = 1 + slope[0]  # S(-1) = S(0) + 1
        bands[2, :-1] = -(slope * (n - c + 1))[1:]
        known = n * heights[line]
        known[0] += n * slope[0]
        S = linalg.solve_banded((1, 1), bands, known)
        before = np.concatenate([[S[0] + 1], S[:-1]])
        wrong = share * ((n - c + 1) * before - (n - c + 2) * S) / n
        line, last = np.clip(np.searchsorted(starts, wrong, "right") - 1, 0, None), line
        if (line == last).all():
            break
    at_least = np.concatenate([[1.0], -np.diff(S, append=0.0), [0.0]])
    return np.maximum(-np.diff(at_least), 0.0)


def guess_p_value(right: int, runs: int, coins: int, guesses: int, curve: Tradeoff) -> float:
    """Upper bound on the probability of `right` or more right guesses in `runs` independent runs.

    Each makes `guesses` about `coins` fair coins. Sums keep the increasing convex order, and
    Pr(X >= x) <= E max(X - t, 0) / (x - t) for every t below x. What was seen in earlier runs may
    be used to guess in later ones.

    >>> response = Tradeoff.from_points([(1.0, 0.0)])
    >>> round(guess_p_value(20, 2, 10, 10, response) * (1 + math.exp(-1)) ** 20, 4)
    1.0
    """
    mass = summed(guess_distribution(coins, guesses, curve), runs)
    tail = mass[::-1].cumsum()[::-1]
    excess = tail[::-1].cumsum()[::-1] - tail  # E max(X - t, 0) at t = 0, 1, ...
    if right == 0:
        return 1.0
    bound = (excess[:right] / (right - np.arange(right))).min()
    return float(np.clip(bound, ROUNDING, 1.0))


def summed(mass: Floats, n: int) -> Floats:
    """Distribution of the sum of n independent counts, from the distribution of one."""
    size = (len(mass) - 1) * n + 1
    spectrum = np.fft.rfft(mass, 2 ** math.ceil(math.log2(max(2, size))))
    return np.maximum(np.fft.irfft(spectrum**n)[:size], 0.0)
