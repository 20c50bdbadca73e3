"""The list of memorized examples, with its false-discovery rate controlled.

Shapes: N examples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from raymem.scores.estimates import Floats

JEFFREYS = 0.5
ROUNDING = 1e-12
QUADRATURE_POINTS = 200
# Rows of N x points that are worked on at once.
TILE = 4096


def probability_above(
    threshold: float,
    right_in: ArrayLike,
    n_in: ArrayLike,
    right_out: ArrayLike,
    n_out: ArrayLike,
) -> Floats:
    """Posterior probability that memorization is above `threshold`; all arguments [N].

    Each arm's accuracy has Jeffreys' prior Beta(1/2, 1/2), so its posterior is Beta(right + 1/2,
    wrong + 1/2), and P(p_in - p_out > threshold) is the mean of P(p_in > u + threshold) over the
    posterior of p_out, taken at 200 Gauss-Legendre points of its quantiles. NaN where an arm has no
    trial.

    >>> probability_above(0.25, [70], [70], [3], [30]).round(3).tolist()
    [1.0]
    """
    arguments = (right_in, n_in, right_out, n_out)
    arrays = [np.atleast_1d(np.asarray(a, np.float64)) for a in arguments]
    counts = np.stack(np.broadcast_arrays(*arrays))
    unique, back = np.unique(counts, axis=1, return_inverse=True)
    found = np.full(unique.shape[1], np.nan)
    defined = np.flatnonzero((unique[1] > 0) & (unique[3] > 0))
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)
    quantiles, weights = (nodes + 1) / 2, weights / 2
    for start in range(0, len(defined), TILE):
        part = defined[start : start + TILE]
        k_in, m_in, k_out, m_out = unique[:, part, None]
        u = special.betaincinv(k_out + JEFFREYS, m_out - k_out + JEFFREYS, quantiles)
        at = np.minimum(u + threshold, 1)
        above = special.betaincc(k_in + JEFFREYS, m_in - k_in + JEFFREYS, np.maximum(at, 0))
        found[part] = above @ weights
    return found[back.reshape(-1)]


def list_with_fdr(probability: ArrayLike, rate: float = 0.05) -> NDArray[np.bool_]:
    """The longest list whose expected share of false entries is at most `rate`: bool [N].

    probability [N]: of each example, that it belongs on the list. The list takes the most probable
    examples as long as the mean of (1 - probability) over it is at most `rate`: the Bayesian
    false-discovery rate (Newton et al. 2004, "Detecting differential gene expression with a
    semiparametric hierarchical mixture method", section 4). Equal probabilities are in or out
    together; NaN is out.

    >>> list_with_fdr([0.99, 0.5, 0.98, float("nan")]).tolist()
    [True, False, True, False]
    """
    wrong = 1 - np.asarray(probability, np.float64)
    order = np.sort(wrong[np.isfinite(wrong)])
    if len(order) == 0:
        return np.zeros(len(wrong), bool)
    last_of_equals = np.append(order[1:] > order[:-1], True)
    allowed = (np.cumsum(order) / np.arange(1, len(order) + 1) <= rate + ROUNDING) & last_of_equals
    if not allowed.any():
        return np.zeros(len(wrong), bool)
    listed: NDArray[np.bool_] = wrong <= order[np.flatnonzero(allowed)[-1]]
    return listed
