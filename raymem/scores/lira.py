"""LiRA on arrays: how likely is an example's margin under models with and without it?

In:  margins and subsets of trials, one trial at a time, in running sums. Out: scores, high for
     members.

Shapes: T trials, N training examples. Arms are rows: 0 out, 1 in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from raymem.scores.estimates import Floats, ratio
from raymem.scores.running_sums import IN, OUT, Counts, RunningSums, by_arm

# In each arm, from so many trials on an example has variances of its own (Carlini et al. 2022: from
# 64 models on they are better than fixed ones).
TRIALS_FOR_VARIANCE = 32
# Margins are kept as float32: a spread below a thousandth of a nat is rounding, squared.
LEAST_VARIANCE = 1e-6


def margin_sums(first: ArrayLike) -> RunningSums:
    """Empty sums of margins and p_true by arm, [2, N].

    `first` [N] are any trial's margins: the origin, with which equal margins have a variance of
    exactly 0.
    """
    origin = np.asarray(first, np.float64)
    return RunningSums.zeros(
        (2, len(origin)), ["margin", "p_true"], squares=["margin"], origin={"margin": origin}
    )


def add_margins(
    sums: RunningSums, margins: ArrayLike, inside: ArrayLike, wanted: ArrayLike = True
) -> None:
    """Add one trial: margins [N], and whether it trained on each example, bool [N]; of the `wanted`
    examples only, bool [N].

    Raises ValueError for margins that are not finite.
    """
    margin = np.asarray(margins, np.float64)
    if not np.isfinite(margin).all():
        raise ValueError("margins must be finite")
    sums.add(by_arm(inside) & np.asarray(wanted), margin=margin, p_true=special.expit(margin))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What models with and without each example say of it."""

    n: Counts
    """Trials, [2, N]."""
    mean: Floats
    """Mean margin, [2, N], nats; NaN without trials."""
    variance: Floats
    """Unbiased variance of margins over trials, [2, N], nats^2; NaN with fewer than two trials."""
    pooled: Floats
    """The variance that all examples of an arm share, within examples, [2]; NaN if no example of
    the arm has two trials."""
    p_true: Floats
    """Mean probability of the true class, [2, N]; NaN without trials."""

    @classmethod
    def of(cls, sums: RunningSums) -> Moments:
        """Of `margin_sums`.

        >>> sums = margin_sums([1.0, 2.0])
        >>> add_margins(sums, [1.0, 2.0], [True, False])
        >>> add_margins(sums, [3.0, 2.0], [True, False])
        >>> Moments.of(sums).mean[IN].tolist(), Moments.of(sums).variance[IN].tolist()
        ([2.0, nan], [2.0, nan])
        """
        several = sums.n > 1
        within = np.where(several, sums.squared_deviations("margin"), 0.0)
        return cls(
            n=sums.n,
            mean=sums.mean("margin"),
            variance=sums.variance("margin"),
            pooled=ratio(within.sum(1), np.where(several, sums.n - 1, 0).sum(1)),
            p_true=sums.mean("p_true"),
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """The examples that have trials in both arms: bool [N]."""
        found: NDArray[np.bool_] = np.logical_and(*(self.n > 0))
        return found

    @property
    def own_variance(self) -> NDArray[np.bool_]:
        """The examples with 32 trials or more in each arm, whose variances are their own."""
        found: NDArray[np.bool_] = np.logical_and(*(self.n >= TRIALS_FOR_VARIANCE))
        return found

    def stdev(self) -> Floats:
        """The standard deviations that `online` and `offline` use, [2, N], nats.

        An example's own from 32 trials in each arm on; else the arm's pooled one. An arm without
        two trials of any example takes the other's. Raises ValueError if that has none either.
        """
        pooled = np.where(np.isnan(self.pooled), self.pooled[::-1], self.pooled)
        if np.isnan(pooled).any():
            raise ValueError("no example has two trials in or two trials out: no variance is known")
        chosen = np.where(self.own_variance, self.variance, pooled[:, None])
        spread: Floats = np.sqrt(np.maximum(chosen, LEAST_VARIANCE))
        return spread


def with_some_variance(moments: Moments) -> Moments:
    """The same, where one reference model in each arm says nothing of a variance: both arms get the
    variance of in-margins over examples, as in the authors' script (see `online`)."""
    if not np.isnan(moments.pooled).all():
        return moments
    over_examples = np.var(moments.mean[IN][moments.n[IN] > 0])
    return replace(moments, pooled=np.full(2, over_examples))


def above_mean(margins: ArrayLike, others: Moments) -> Floats:
    """The margin minus its mean over the reference models, with and without the example, [N], nats.

    It needs no variance, and one mean for each example where `online` needs two. NaN where there is
    no reference model.

    >>> others = margin_sums([0.0])
    >>> add_margins(others, [3.0], [True])
    >>> add_margins(others, [1.0], [False])
    >>> above_mean([5.0], Moments.of(others)).tolist()
    [3.0]
    """
    total = (np.nan_to_num(others.mean) * others.n).sum(0)
    found: Floats = np.asarray(margins, np.float64) - ratio(total, others.n.sum(0))
    return found


def online(margins: ArrayLike, others: Moments) -> Floats:
    """Log likelihood ratio of in against out, [N], nats; NaN where an arm is empty.

    Carlini et al. 2022, "Membership Inference Attacks From First Principles", algorithm 1: log
    N(x; mean_in, sd_in) - log N(x; mean_out, sd_out), where x is the target model's margin. The
    fixed variance is that of margins around each example's own mean, for each arm; the authors'
    script (tensorflow/privacy, research/mi_lira_2021/plot.py) takes the spread of all in-margins
    for both arms, which examples that differ make wider, and medians for means.

    `others` must not have seen the target, nor trials whose subsets depend on the target's: see
    `scores`. Raises ValueError if no variance is known.

    >>> others = margin_sums([0.0])
    >>> for margin, inside in [(3.0, True), (5.0, True), (-1.0, False), (1.0, False)]:
    ...     add_margins(others, [margin], [inside])
    >>> online([2.0], Moments.of(others)).round(3).tolist()
    [0.0]
    >>> online([4.0], Moments.of(others)).round(3).tolist()
    [4.0]
    """
    x, stdev = np.asarray(margins, np.float64), others.stdev()
    out, inside = (stats.norm.logpdf(x, others.mean[arm], stdev[arm]) for arm in (OUT, IN))
    found: Floats = inside - out
    return found


def offline(margins: ArrayLike, others: Moments) -> Floats:
    """How far above the out-models' margins, in their standard deviations, [N].

    Carlini et al. 2022, section IV-D, needs no model that trained on the example: they score
    Pr[N(mean_out, sd_out) <= x], of which this is the normal quantile, in the same order and
    without ties near 1. NaN where no out-model is. Raises ValueError if no variance is known.
    """
    found: Floats = (np.asarray(margins, np.float64) - others.mean[OUT]) / others.stdev()[OUT]
    return found


def scores(
    margins: ArrayLike, masks: ArrayLike, target: int, left_out: Sequence[int]
) -> tuple[Floats, Floats]:
    """`online` and `offline` scores of trial `target` from the trials not in `left_out`.

    margins float [T, N], masks bool [T, N]; `left_out` holds the target and all trials whose
    subsets depend on its subset. In a balanced plan those are *all trials of its block*: of a block
    of B every example is in exactly r B, so the other B - 1 tell the target's membership without
    any model (r B - 1 of them have it, or r B). It gets into the score through the number of
    reference trials: of margins that are nothing but noise, the arm that the target was taken from
    has one trial less, its mean is a little noisier, and so the target looks unlike it. Such a leak
    would count as an attack's success, or hide one. Blocks are drawn independently.

    Raises ValueError if `left_out` lacks the target, for margins that are not finite, and if no
    variance is known.

    >>> margins = [[2.0], [3.0], [5.0], [-1.0], [1.0]]
    >>> masks = [[True], [True], [True], [False], [False]]
    >>> [s.round(3).tolist() for s in scores(margins, masks, target=0, left_out=[0])]
    [[0.0], [1.414]]
    """
    x, inside = np.asarray(margins, np.float64), np.asarray(masks, bool)
    if target not in left_out:
        raise ValueError(f"left_out must hold the target, trial {target}")
    others = margin_sums(x[target])
    for trial in sorted({*range(len(x))} - {*left_out}):
        add_margins(others, x[trial], inside[trial])
    moments = Moments.of(others)
    return online(x[target], moments), offline(x[target], moments)


def vulnerability(moments: Moments) -> tuple[Floats, Floats]:
    """d' of each example and its standard error, [N] each, in standard deviations.

    (mean_in - mean_out) / pooled standard deviation: how far apart the margins of models with and
    without the example are; an attack on it alone has an AUC of Phi(d' / sqrt 2), if margins are
    normal with equal variances. The standard error is that of a standardized difference (Hedges &
    Olkin 1985): sqrt(1/n_in + 1/n_out + d'^2 / (2 (n_in + n_out))).

    NaN where an arm is empty, with fewer than three trials, and where margins do not vary.

    >>> sums = margin_sums([0.0])
    >>> for margin, inside in [(3.0, True), (5.0, True), (-1.0, False), (1.0, False)]:
    ...     add_margins(sums, [margin], [inside])
    >>> [values.round(3).tolist() for values in vulnerability(Moments.of(sums))]
    [[2.828], [1.414]]
    """
    freedom = np.maximum(moments.n - 1, 0)
    within = (np.nan_to_num(moments.variance) * freedom).sum(0)
    pooled = ratio(within, freedom.sum(0))
    # Zero is no spread, and what is below rounding none either.
    stdev = np.sqrt(np.where(pooled > LEAST_VARIANCE, pooled, np.nan))
    apart: Floats = (moments.mean[IN] - moments.mean[OUT]) / stdev
    total = moments.n.sum(0)
    error = np.sqrt(ratio(1, moments.n).sum(0) + ratio(apart**2, 2 * total))
    return apart, np.where(np.isnan(apart), np.nan, error)
