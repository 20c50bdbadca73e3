"""Memorization from masks and outcomes: estimates, standard errors, intervals, reliability.

Shapes: T trials, N examples, F folds (whole blocks of trials). `in` and `out` are the two arms of
an example: the trials that did, and did not, train on it. Undefined values are NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
HALF_SPLITS = 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One estimate per example, [N], with what it is worth."""

    value: Floats
    """The difference in minus out, in [-1, 1]; NaN where an arm has no trial."""
    stderr: Floats
    """Standard error; NaN where an arm has fewer than two trials."""
    low: Floats
    """Lower end of the 95% interval."""
    high: Floats
    """Upper end of the 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Memorization(Estimate):
    """Memorization of N examples by T trials."""

    n_in: NDArray[np.int64]
    """[N] Trials that trained on the example."""
    n_out: NDArray[np.int64]
    """[N] Trials that did not."""
    accuracy_in: Floats
    """[N] Share of in-trials that get it right."""
    accuracy_out: Floats
    """[N] Share of out-trials that get it right."""
    soft: Estimate | None
    """The same from p_true, if it was given."""


def memorization(
    masks: ArrayLike, correct: ArrayLike, p_true: ArrayLike | None = None
) -> Memorization:
    """How much more often models get an example right when they trained on it.

    mem(i) = mean of correct over trials with i in the subset, minus the mean over trials without:
    Feldman & Zhang 2020, eq. 1 and Algorithm 1. `soft` is the same difference of p_true, the
    probability of the label: less noisy, but another estimand (a model can be right with p < 1).

    masks: bool [T, N], is example i in trial t's subset. correct: bool [T, N]. p_true: [T, N] in
    [0, 1]. Intervals are 95%: Newcombe's for `correct`, `difference_of_means` for p_true.

    Raises ValueError if shapes differ or values are not what they should be.

    >>> import numpy as np
    >>> masks = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    >>> correct = np.array([[1, 1], [1, 1], [0, 1], [0, 1]], bool)
    >>> result = memorization(masks, correct)
    >>> result.value.tolist(), result.n_in.tolist()
    ([1.0, 0.0], [2, 2])
    """
    inside, right = _booleans("masks", masks), _booleans("correct", correct)
    if inside.shape != right.shape:
        raise ValueError(f"masks are {inside.shape} but correct is {right.shape}; both are [T, N]")
    n_in = inside.sum(axis=0)
    n_out = (~inside).sum(axis=0)
    right_in = (right & inside).sum(axis=0)
    right_out = (right & ~inside).sum(axis=0)
    hard = difference_of_proportions(right_in, n_in, right_out, n_out)
    return Memorization(
        value=hard.value,
        stderr=hard.stderr,
        low=hard.low,
        high=hard.high,
        n_in=n_in,
        n_out=n_out,
        accuracy_in=ratio(right_in, n_in),
        accuracy_out=ratio(right_out, n_out),
        soft=None if p_true is None else _soft(inside, np.asarray(p_true, np.float64)),
    )


def _soft(inside: NDArray[np.bool_], p: Floats) -> Estimate:
    if p.shape != inside.shape:
        raise ValueError(f"masks are {inside.shape} but p_true is {p.shape}; both are [T, N]")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p_true must be probabilities in [0, 1]")
    p_in, p_out = np.where(inside, p, 0), np.where(inside, 0, p)
    return difference_of_means(
        p_in.sum(axis=0),
        (p_in**2).sum(axis=0),
        inside.sum(axis=0),
        p_out.sum(axis=0),
        (p_out**2).sum(axis=0),
        (~inside).sum(axis=0),
    )


def difference_of_proportions(
    right_in: ArrayLike, n_in: ArrayLike, right_out: ArrayLike, n_out: ArrayLike
) -> Estimate:
    """right_in / n_in - right_out / n_out with Newcombe's interval; all [N].

    The interval is method 10 of Newcombe 1998 (Wilson limits of each arm, combined): it covers 95%
    also at few trials and at proportions of 0 and 1, where the standard error is 0, saying nothing.
    The standard error is that of two independent means, sqrt(sum of p(1-p)/(n-1)).

    >>> e = difference_of_proportions([56], [70], [48], [80])  # Newcombe 1998, Table II, (a)
    >>> [round(float(v[0]), 4) for v in (e.value, e.low, e.high)]
    [0.2, 0.0524, 0.3339]
    """
    right_in, n_in, right_out, n_out = (
        np.asarray(a, np.float64) for a in (right_in, n_in, right_out, n_out)
    )
    p_in, p_out = ratio(right_in, n_in), ratio(right_out, n_out)
    value = p_in - p_out
    low_in, high_in = _wilson(p_in, n_in)
    low_out, high_out = _wilson(p_out, n_out)
    return Estimate(
        value=value,
        stderr=np.sqrt(ratio(p_in * (1 - p_in), n_in - 1) + ratio(p_out * (1 - p_out), n_out - 1)),
        low=value - np.hypot(p_in - low_in, high_out - p_out),
        high=value + np.hypot(high_in - p_in, p_out - low_out),
    )


def difference_of_means(
    sum_in: ArrayLike,
    squares_in: ArrayLike,
    n_in: ArrayLike,
    sum_out: ArrayLike,
    squares_out: ArrayLike,
    n_out: ArrayLike,
) -> Estimate:
    """Mean in minus mean out of values in [0, 1], from sums and sums of squares; all [N].

    The standard error is Welch's (unequal variances). The interval is Welch's t interval
    (Welch-Satterthwaite degrees of freedom) after one value of 0 and one of 1 were added to each
    arm, as Agresti & Caffo 2000 do for proportions, widened to the estimate and cut to [-1, 1].
    Values near 0 or 1 with rare others have a sample variance near 0: without the added values the
    interval covers 40 to 90% below a difference of 0.2 at 40 to 100 trials, with them 94% or more.
    It uses only that values are in [0, 1]. NaN where an arm has fewer than two trials.

    >>> e = difference_of_means([28.0], [28.0], [28], [12.0], [12.0], [12])
    >>> float(e.value[0]), float(e.stderr[0]), [round(float(v[0]), 2) for v in (e.low, e.high)]
    (0.0, 0.0, [-0.13, 0.2])
    """
    arms = [
        tuple(np.asarray(sums, np.float64) for sums in arm)
        for arm in ((sum_in, squares_in, n_in), (sum_out, squares_out, n_out))
    ]
    (mean_in, of_in), (mean_out, of_out) = (mean_and_stderr(*arm) for arm in arms)
    value, stderr = mean_in - mean_out, np.hypot(of_in, of_out)
    centre, half = _welch([(total + 1, squares + 1, n + 2) for total, squares, n in arms])
    known = np.isfinite(stderr)
    return Estimate(
        value=value,
        stderr=stderr,
        low=np.where(known, np.clip(np.minimum(centre - half, value), -1, 1), np.nan),
        high=np.where(known, np.clip(np.maximum(centre + half, value), -1, 1), np.nan),
    )


def _welch(arms: Sequence[tuple[Floats, Floats, Floats]]) -> tuple[Floats, Floats]:
    """Difference of two means and half its 95% t interval, from sums, sums of squares, counts."""
    (mean_in, of_in), (mean_out, of_out) = (mean_and_stderr(*arm) for arm in arms)
    variance = of_in**2 + of_out**2
    freedoms = (ratio(of**4, n - 1) for of, (_, _, n) in zip((of_in, of_out), arms, strict=True))
    freedom = ratio(variance**2, sum(freedoms, np.zeros(())))
    half = special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variance)
    return mean_in - mean_out, half


def mean_and_stderr(total: ArrayLike, squares: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    """Mean of n values and its standard error, from their sum and sum of squares; all [N].

    NaN without values, and the error with fewer than two.
    """
    s, q, n = (np.asarray(a, np.float64) for a in (total, squares, n))
    return ratio(s, n), np.sqrt(ratio(sum_of_squared_deviations(s, q, n), (n - 1) * n))


def sum_of_squared_deviations(total: Floats, squares: Floats, n: ArrayLike) -> Floats:
    """Of n values from their mean, from their sum and sum of squares; NaN without values.

    >>> sum_of_squared_deviations(np.array([4.0]), np.array([10.0]), 2).tolist()
    [2.0]
    """
    found: Floats = np.maximum(squares - np.asarray(n, np.float64) * ratio(total, n) ** 2, 0)
    return found


def reliability(
    right_in: ArrayLike, n_in: ArrayLike, right_out: ArrayLike, n_out: ArrayLike
) -> float:
    """Split-half reliability R of memorization, from sums per fold, each [F, N].

    The Pearson correlation rho over examples between the memorization of two random halves of the
    folds, averaged over fixed random splits, extrapolated to all trials: R = 2 rho / (1 + rho) for
    equal halves (Spearman-Brown), its generalization for halves of a and b trials. sqrt(R) is the
    expected correlation with the truth; R is cut at -1. NaN with fewer than two folds, or if
    nothing varies.
    """
    sums = [np.asarray(a, np.float64) for a in (right_in, n_in, right_out, n_out)]
    F = len(sums[0])
    if F < 2:
        return math.nan
    # The splits only have to be fixed for one version of numpy: they move R in its third digit.
    generator = np.random.default_rng(0)
    found = []
    for _ in range(HALF_SPLITS):
        half = generator.permutation(F) < F // 2
        first, second = (
            _difference(*(s[side].sum(axis=0) for s in sums)) for side in (half, ~half)
        )
        both = np.isfinite(first) & np.isfinite(second)
        if both.sum() < 3 or first[both].std() == 0 or second[both].std() == 0:
            return math.nan
        trials = [_effective(*(s[side].sum(axis=0) for s in sums[1::2])) for side in (half, ~half)]
        found.append((float(np.corrcoef(first[both], second[both])[0, 1]), *trials))
    rho, a, b = np.mean(found, axis=0)
    return _of_all_trials(float(rho), float(a), float(b))


def _effective(n_in: Floats, n_out: Floats) -> float:
    """Half the trials an even design would need for the same noise: 1 / (1/n_in + 1/n_out)."""
    return float(np.nanmean(ratio(n_in * n_out, n_in + n_out)))


def _of_all_trials(rho: float, a: float, b: float) -> float:
    """Reliability of a + b trials, if a and b trials correlate with rho.

    With x the noise of one trial over the signal, both variances, rho^2 (1 + x/a) (1 + x/b) = 1.
    """
    if rho <= 0:
        return max(-1.0, 2 * rho / (1 + rho)) if rho > -1 else -1.0
    p, q = 1 / (a * b), 1 / a + 1 / b
    x = (-q + math.sqrt(q * q + 4 * p * (1 / rho**2 - 1))) / (2 * p)
    return 1 / (1 + x / (a + b))


def forecast_trials(trials: int, reliability: float, target: float) -> float:
    """Trials that would have reliability `target`, if `trials` have `reliability`.

    t* = t R*(1 - R) / (R (1 - R*)): noise variance falls as 1/t. NaN or inf where R says nothing.

    >>> forecast_trials(100, 0.9, 0.95)
    211.1
    """
    if not 0 < reliability < 1:
        return math.nan
    return round(trials * target * (1 - reliability) / (reliability * (1 - target)), 1)


def correlation_interval(
    value: float, replicates: ArrayLike, *, scale: float = 1.0
) -> tuple[float, float]:
    """95% interval of a correlation from its bootstrap replicates [R]: the standard deviation of
    Fisher's z = arctanh(r) around the estimate.

    `scale` is by how much the replicates spread too far, root of their size over the sample's. NaN
    with fewer than two finite replicates.

    >>> [round(end, 2) for end in correlation_interval(0.5, [0.4, 0.5, 0.6])]
    [0.28, 0.67]
    """
    drawn = np.asarray(replicates, np.float64)
    drawn = drawn[np.isfinite(drawn)]
    if math.isnan(value) or len(drawn) < 2:
        return math.nan, math.nan
    z, *others = np.arctanh(np.clip([value, *drawn], -1 + 1e-12, 1 - 1e-12))
    half = float(special.ndtri((1 + CONFIDENCE) / 2) * np.std(others, ddof=1)) * scale
    return math.tanh(z - half), math.tanh(z + half)


def spearman_ceiling(a: ArrayLike, b: ArrayLike) -> float:
    """The largest Spearman correlation that the values a [N] and b [N] can have in any pairing.

    Spearman's coefficient is Pearson's of midranks. By the rearrangement inequality it is largest
    when both are paired in order; ties in one that the other does not share keep it below 1. If b
    has no ties and t_g of the values of a are tied in group g, the pairing in order has the mean
    rank of b in each group equal to the midrank of a, and the ceiling is sd(ranks a) / sd(ranks b)
    = sqrt(1 - sum_g (t_g^3 - t_g) / (N^3 - N)). With one tied value of share s: sqrt(1 - s^3). NaN
    if a or b does not vary or N is 0.

    >>> memorization, curvature = np.zeros(1000), np.arange(1000)
    >>> memorization[880:] = np.arange(1, 121)
    >>> round(spearman_ceiling(memorization, curvature), 3)
    0.564
    """
    from scipy.stats import rankdata  # takes a second to import

    x, y = (rankdata(np.sort(np.asarray(values, np.float64))) for values in (a, b))
    if len(x) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan


def most_tied(values: ArrayLike) -> tuple[float, float]:
    """The most frequent value and its share of all; NaN without values.

    >>> most_tied([0.0, 0.0, 0.3, 0.0])
    (0.0, 0.75)
    """
    found, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    if len(found) == 0:
        return math.nan, math.nan
    most = int(counts.argmax())
    return float(found[most]), float(counts[most] / counts.sum())


def ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """above / below, NaN where below is not positive."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    out = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out


def _difference(right_in: Floats, n_in: Floats, right_out: Floats, n_out: Floats) -> Floats:
    return ratio(right_in, n_in) - ratio(right_out, n_out)


def _wilson(p: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Wilson's interval of a proportion; NaN goes through."""
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    n = np.maximum(n, 1)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return centre - half, centre + half


def _booleans(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"{name} must be [T, N], trials by examples; got shape {array.shape}")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be true or false (or 1 and 0); got {array.dtype} values")
    return array.astype(bool)
