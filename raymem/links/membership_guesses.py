"""The two audits of link 3 that guess which trials trained on which examples.

In:  margins and subsets of the candidates, and the curve that a mechanism claims.
Out: `CandidateAudit`, of each candidate by itself; `PairAudit`, of all candidates together.

Neither assumes anything of models and margins: only membership is random (see
`raymem.privacy.membership_audit`), and nothing is learnt from a trial that it is then used on.

Shapes: T trials, P candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.links.column_arrays import Floats
from raymem.plan import Plan
from raymem.privacy import (
    Mechanism,
    Tradeoff,
    guess_p_value,
    highest_are_in,
    largest_refuted,
    rank_tail,
    summed,
)
from raymem.scores.running_sums import IN, OUT, RunningSums, by_arm

CONFIDENCE = 0.95
# Shares of the coins that are guessed: those with the clearest scores, and all.
GUESSED = (1 / 3, 1.0)
# What is usual among candidates weighs as much as this many trials of a candidate's own.
SHRINKAGE = 4.0


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Examples chosen by a rule that does not look at the trials here, and their scores."""

    what: str
    """Which examples."""
    blocks: NDArray[np.int64]
    """[T] Block of each trial, rising."""
    inside: NDArray[np.bool_]
    """[T, P]"""
    scores: Floats
    """[T, P] Margins minus the median margin of all training examples in the same trial: what a
    trial does to all examples alike is no sign of membership."""


@dataclass(frozen=True, kw_only=True)
class CandidateAudit:
    """What the candidate that says most says against a claim, taken by itself."""

    examples: int
    """Candidates."""
    what: str
    """Which they are."""
    right: int
    """Of the most telling candidate: its in-trials among as many trials with the highest margins,
    summed over blocks."""
    guesses: int
    """Its in-trials."""
    certified: float
    """Lower bound on epsilon, for any mechanism with the claimed delta, at the level of a test."""
    certifiable: float
    """The same if every candidate's in-trials had the highest margins."""
    p_value: float | None
    """Of the claim, corrected for the number of candidates; None without a claim."""
    least_p_value: float | None
    """The same if every in-trial had the highest margins: a claim with more cannot be refuted."""


@dataclass(frozen=True, kw_only=True)
class PairAudit:
    """How often it was told right which of two trials trained on an example, of all candidates."""

    what: str
    """Which candidates."""
    runs: int
    """Pairs of trials: independent runs."""
    guesses: int
    """Guesses in each."""
    right: int
    """Right guesses in all runs."""
    accuracy: float
    """Their share."""
    low: float
    """95% interval over runs."""
    high: float
    allowed: float | None
    """The largest accuracy that the claim allows; None without a claim."""
    refuted_from: float | None
    """The accuracy from which on the claim is refuted; above 1: it cannot be. None without one."""
    p_value: float | None
    """Of the claim, corrected for the shares that are guessed; None without a claim."""
    epsilon: float
    """Lower bound on epsilon, for any mechanism with the claimed delta, 95%: describes only."""


def audit_candidates(
    of: Candidates, plan: Plan, mechanism: Mechanism | None, *, level: float
) -> CandidateAudit | None:
    """The audit of each candidate by itself; None if none has trials in and out of a block.

    In each block the in-trials among the n_in with the highest scores are counted: ranks need no
    threshold, and are not moved by how hard an example is. Their sum over blocks has an exact null
    distribution under the claimed curve (`rank_tail`); p-values are multiplied by the number of
    candidates (Bonferroni). In subsets of a fixed size another example takes the place of one, and
    the curve is that of a replacement.
    """
    right, counts = np.zeros(of.inside.shape[1], np.int64), []
    for block in np.unique(of.blocks):
        here = of.blocks == block
        right += highest_are_in(of.scores[here], of.inside[here])
        counts.append(of.inside[here].sum(0))
    n_in, sizes = np.array(counts), [int((of.blocks == b).sum()) for b in np.unique(of.blocks)]
    tested = np.flatnonzero(((n_in > 0) & (n_in < np.array(sizes)[:, None])).any(0))
    if len(tested) == 0:
        return None
    fixed = plan.kind == "fixed-size"
    delta = 0.0 if mechanism is None else mechanism.delta
    designs, which = np.unique(n_in[:, tested].T, axis=0, return_inverse=True)

    def p_values(curve: Tradeoff, counted: NDArray[np.int64]) -> Floats:
        curve = curve.replaced if fixed else curve
        tails = [_tail_over_blocks(design, sizes, curve) for design in designs.tolist()]
        found = [tails[d][k] for d, k in zip(which, counted, strict=True)]
        return np.asarray(np.minimum(1.0, len(tested) * np.array(found)))

    def certified(design: list[int], count: int) -> float:
        def p_value(epsilon: float) -> float:
            curve = Tradeoff.from_points([(epsilon, delta)])
            tail = _tail_over_blocks(design, sizes, curve.replaced if fixed else curve)
            return len(tested) * float(tail[count])

        return largest_refuted(p_value, level)

    claim = _claimed(mechanism)
    curve = claim or Tradeoff.from_points([(0.0, 0.0)])
    perfect = n_in[:, tested].sum(0)
    told, least = p_values(curve, right[tested]), p_values(curve, perfect)
    best, most = int(np.argmin(told)), int(np.argmin(least))
    return CandidateAudit(
        examples=len(tested),
        what=of.what,
        right=int(right[tested][best]),
        guesses=int(perfect[best]),
        certified=certified(designs[which[best]].tolist(), int(right[tested][best])),
        certifiable=certified(designs[which[most]].tolist(), int(perfect[most])),
        p_value=None if claim is None else float(told.min()),
        least_p_value=None if claim is None else float(least.min()),
    )


def could_be_refuted(
    mechanism: Mechanism, plan: Plan, trials: int, candidates: int, *, level: float
) -> bool:
    """Would so many trials refute this claim if all guesses about membership were right?"""
    claim = mechanism.tradeoff
    n_in = round(plan.subset_ratio * plan.block)
    sizes = [plan.block] * (trials // plan.block)
    if sizes and 0 < n_in < plan.block:
        singly = claim.replaced if plan.kind == "fixed-size" else claim
        tail = _tail_over_blocks([n_in] * len(sizes), sizes, singly)
        if candidates * tail[-1] <= level:
            return True
    told_apart = 2 * plan.subset_ratio * (1 - plan.subset_ratio)
    coins, runs = int(told_apart * candidates), trials // 2
    if plan.kind == "fixed-size" or coins < 2 or runs < 2:
        return False
    return _refuted_from(claim.swapped, runs, coins, coins, level) <= 1


def _tail_over_blocks(design: Sequence[int], sizes: Sequence[int], curve: Tradeoff) -> Floats:
    """Tail of the number of right guesses about one example, n_in of each block being guessed."""
    mass = np.ones(1)
    blocks = list(zip(design, sizes, strict=True))
    for n_in, size in sorted(set(blocks)):
        tail = rank_tail(n_in, size - n_in, curve) if n_in else np.ones(1)
        one = -np.diff(tail, append=0.0)
        mass = np.convolve(mass, summed(one, blocks.count((n_in, size))))
    return np.asarray(mass[::-1].cumsum()[::-1])


def audit_pairs(of: Candidates, mechanism: Mechanism | None, *, level: float) -> PairAudit | None:
    """The audit of all candidates together; None where no two trials of a block tell enough apart.

    Trials of a block are taken two by two. A candidate that is in one of the two and not in the
    other is a coin, as one-run audits need it; every pair uses every such coin, and is a run by
    itself: training shares nothing but the subsets, which are given. So every trial of every block
    is used, and the right guesses of independent runs add up (`guess_p_value`), whatever the
    dependence of guesses about one pair.

    A guess goes by the difference of the candidate's scores in the two trials, weighted by what the
    pairs before showed of it: the gap of its in- and out-scores, and their variance.
    """
    told = {pair: int((of.inside[pair[0]] != of.inside[pair[1]]).sum()) for pair in _pairs_of(of)}
    runs = [pair for pair, coins in told.items() if coins >= 2]
    if len(runs) < 2:
        return None
    coins = min(told[pair] for pair in runs)
    references = References(of.inside.shape[1])
    counts = np.zeros((len(runs), len(GUESSED)), np.int64)
    guesses = [max(1, round(share * coins)) for share in GUESSED]
    for run, (a, b) in enumerate(runs):
        weights = references.weights()
        told_apart = np.flatnonzero(of.inside[a] != of.inside[b])
        chosen = told_apart[np.argsort(-weights[told_apart], kind="stable")[:coins]]
        score = weights[chosen] * (of.scores[a] - of.scores[b])[chosen]
        clearest = np.argsort(-np.abs(score), kind="stable")
        right = ((score > 0) == of.inside[a][chosen])[clearest]
        counts[run] = [right[:n].sum() for n in guesses]
        for trial in (a, b):
            references.add(of.scores[trial], of.inside[trial])
    return _pair_audit(of.what, coins, guesses, counts, mechanism, level=level)


def _pairs_of(of: Candidates) -> list[tuple[int, int]]:
    """Trials of a block two by two, in order; one that is left over is not used."""
    places = [np.flatnonzero(of.blocks == block).tolist() for block in np.unique(of.blocks)]
    return [pair for block in places for pair in zip(block[::2], block[1::2], strict=False)]


class References:
    """What earlier trials showed of each candidate's scores, in and out of the subset."""

    def __init__(self, P: int) -> None:
        self.sums = RunningSums.zeros((2, P), ["score"], squares=["score"])

    def add(self, scores: Floats, inside: NDArray[np.bool_]) -> None:
        """One more trial: scores and membership, [P] each."""
        self.sums.add(by_arm(inside), score=scores)

    def weights(self) -> Floats:
        """Gap over variance of each candidate, [P]: a score times it is a log likelihood ratio for
        Gaussian scores, but for a constant. Shrunk to what is usual among candidates: the median
        gap, and the lower quartile of variances, since one that varies more soon shows it."""
        n, means = self.sums.n, self.sums.mean("score")
        known = (n > 0).all(0)
        if not known.any():
            return np.ones(n.shape[1])
        spread = np.nan_to_num(self.sums.squared_deviations("score")).sum(0)
        degrees = np.maximum(n - 1, 0).sum(0)
        usual = np.quantile(spread[known] / np.maximum(degrees[known], 1), 0.25)
        variance = np.maximum((spread + SHRINKAGE * usual) / (degrees + SHRINKAGE), 1e-12)
        gap = np.where(known, means[IN] - means[OUT], 0.0)
        pairs = np.where(known, n.min(0), 0)
        gap = (pairs * gap + SHRINKAGE * np.median(gap[known])) / (pairs + SHRINKAGE)
        return np.asarray(np.maximum(gap, 0.1 * np.sqrt(variance)) / variance)


def _pair_audit(
    what: str,
    coins: int,
    guesses: Sequence[int],
    counts: NDArray[np.int64],
    mechanism: Mechanism | None,
    *,
    level: float,
) -> PairAudit:
    R, n = len(counts), guesses[-1]
    right = [int(k) for k in counts.sum(0)]
    delta = 0.0 if mechanism is None else mechanism.delta

    def p_value(curve: Tradeoff, told: Sequence[int]) -> float:
        p = [guess_p_value(k, R, coins, m, curve) for k, m in zip(told, guesses, strict=True)]
        return min(1.0, len(GUESSED) * min(p))

    claim = _claimed(mechanism)
    swap = None if claim is None else claim.swapped
    accuracy = counts[:, -1] / n
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, R - 1) * accuracy.std(ddof=1) / math.sqrt(R))
    mean = float(accuracy.mean())
    return PairAudit(
        what=what,
        runs=R,
        guesses=n,
        right=right[-1],
        accuracy=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        allowed=None if swap is None else swap.accuracy,
        refuted_from=None if swap is None else _refuted_from(swap, R, coins, n, level),
        p_value=None if swap is None else p_value(swap, right),
        epsilon=largest_refuted(
            lambda e: p_value(Tradeoff.from_points([(e, delta)]).swapped, right), 1 - CONFIDENCE
        ),
    )


def _refuted_from(curve: Tradeoff, runs: int, coins: int, guesses: int, level: float) -> float:
    """The accuracy of all guesses whose corrected p-value is at most `level`."""
    low, high = 0, runs * guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        refuted = len(GUESSED) * guess_p_value(middle, runs, coins, guesses, curve) <= level
        low, high = (low, middle) if refuted else (middle, high)
    return high / (runs * guesses)


def _claimed(mechanism: Mechanism | None) -> Tradeoff | None:
    """The curve of a mechanism; None if nothing is claimed."""
    private = mechanism is not None and math.isfinite(mechanism.epsilon)
    return mechanism.tradeoff if mechanism is not None and private else None
