"""Memorization by leaving one out, and how far scores of random subsets are from it.

In:  the trials of a leave-one-out plan (see `raymem.experiments.LeaveOneOut`).
Out: `LeftOut`: memorization of each example by its definition, with its interval; bias and rank
     correlation of the scores at subset ratio r; a verdict.

Shapes: R repeats, K examples left out, F folds of scoring trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from raymem.encoding import JsonObject
from raymem.errors import StoreError
from raymem.experiments import COUNTS, GROUPS, LeaveOneOut
from raymem.links.column_arrays import Floats
from raymem.links.correlation import Coefficient
from raymem.links.folds import memorization_of
from raymem.links.removal import Mean, read_trial, whole_repeats
from raymem.links.split_half import pearson
from raymem.links.verdicts import Verdict
from raymem.scores import correlation_interval, difference_of_proportions, spearman_ceiling
from raymem.store import Store

LEAST_REPEATS = 2
REPLICATES = 400


@dataclass(frozen=True, kw_only=True)
class Bias:
    """By how much scores at ratio r are above memorization by leaving one out."""

    group: str
    """Which examples."""
    examples: int
    scored: float
    """Mean memorization at ratio r."""
    left_out: float
    """Mean memorization by leaving one out."""
    bias: Mean
    """The difference, with its 95% interval over examples, repeats and scoring trials."""


@dataclass(frozen=True, kw_only=True)
class LeftOut(JsonObject):
    """What a leave-one-out experiment found."""

    url: str
    experiment: LeaveOneOut
    repeats: int
    """Repeats that have all their trials."""
    incomplete: int
    """Repeats that lack a trial, and do not count."""
    accuracy_train: float
    """Mean training accuracy of the trials."""
    examples: pa.Table
    """A row for each example: memorization by leaving one out and at ratio r, with intervals."""
    biases: list[Bias]
    """Of each group."""
    spearman: Coefficient
    """Rank correlation of the two, over all K examples."""
    ceiling: float
    """The largest that ties allow."""
    pearson: Coefficient

    @property
    def verdict(self) -> Verdict:
        """How far the scores are from leaving one out, of randomly chosen examples."""
        return verdict_on_leave_one_out(self)

    def json_fields(self) -> Mapping[str, object]:
        """leave_one_out.json."""
        of = self.experiment
        return {
            "repeats": self.repeats,
            "incomplete_repeats": self.incomplete,
            "scored_ratio": of.scored_ratio,
            "scored_study": of.scored_study,
            "scored_trials": of.scored_trials,
            "chosen_by": of.chosen_by,
            "accuracy_train": self.accuracy_train,
            "ceiling": self.ceiling,
            "bias": self.biases,
            "spearman": self.spearman,
            "pearson": self.pearson,
            "examples": self.examples,
            "verdict": self.verdict,
        }


def find_leave_one_out(store: Store) -> LeftOut:
    """What the leave-one-out experiment in `store` found, from its trials.

    Raises StoreError if the store is of another kind of study or has fewer than two whole repeats.
    """
    plan = store.plan()
    experiment = plan.leave_one_out
    if experiment is None:
        raise StoreError(
            f"{store.url} is no leave-one-out experiment but a study of {plan}; run "
            "jobs/leave_one_out_digits.py, with --scores-from to use the scores of this one"
        )
    whole, begun = whole_repeats(store)
    if len(whole) < LEAST_REPEATS:
        raise StoreError(
            f"{store.url} has {len(whole)} whole repeats of {plan.block} trials, and "
            f"{LEAST_REPEATS} are needed; run its job, which trains what is missing"
        )
    rows = np.asarray(experiment.rows)
    with_it = np.empty((len(whole), len(rows)), bool)
    without, accuracy = with_it.copy(), []
    for r, repeat in enumerate(whole):
        for slot in range(plan.block):
            right, fit = read_trial(store, repeat * plan.block + slot)
            accuracy.append(fit)
            if slot == 0:
                with_it[r] = right[rows]
            else:
                without[r, slot - 1] = right[rows[slot - 1]]
    ids = store.examples()
    names = ids.filter(pc.equal(ids["split"], "train"))["example_id"].to_pylist()
    return compare(
        experiment,
        with_it,
        without,
        ids=[names[row] for row in experiment.rows],
        url=store.url,
        incomplete=len(begun) - len(whole),
        accuracy_train=float(np.mean(accuracy)),
    )


def compare(
    experiment: LeaveOneOut,
    with_it: NDArray[np.bool_],
    without: NDArray[np.bool_],
    *,
    ids: Sequence[str],
    url: str = "",
    incomplete: int = 0,
    accuracy_train: float = math.nan,
    seed: int = 0,
) -> LeftOut:
    """Compare what the K examples' models get right with their scores; both bool [R, K].

    mem(i) = Pr[correct with all examples] - Pr[correct without i] (Feldman 2019), by R models each
    with Newcombe's interval. That interval is for independent arms; the models of a repeat share
    their seeds, which makes it too wide where they agree.

    A group's bias is the mean over its examples of score minus mem(i). Its variance is the sum of
    those of three means: over examples of the differences, over repeats of the group's mem, over
    folds of the group's score. Noise of single models is in two of them, so that the t interval
    (Welch's degrees of freedom) is too wide rather than too narrow. Correlations have intervals
    from a bootstrap over examples (in their groups), repeats and folds. Examples without a score,
    for want of trials in one arm, do not count.
    """
    counts = [experiment.counts(name) for name in COUNTS]
    by_fold, by_repeat = memorization_of(*counts), with_it.astype(float) - without
    scored = memorization_of(*(count.sum(axis=0) for count in counts))
    left_out = by_repeat.mean(axis=0)
    groups = np.asarray(experiment.groups)
    known = np.isfinite(by_fold).all(axis=0)
    members = {str(name): known & (groups == name) for name in GROUPS}
    members["all of these"] = known
    spearman, of_values = _correlations(groups, counts, with_it, without, seed)
    return LeftOut(
        url=url,
        experiment=experiment,
        repeats=len(with_it),
        incomplete=incomplete,
        accuracy_train=accuracy_train,
        examples=_table(experiment, ids, counts, with_it, without),
        biases=[
            Bias(
                group=name,
                examples=int(which.sum()),
                scored=float(scored[which].mean()),
                left_out=float(left_out[which].mean()),
                bias=_bias(scored - left_out, by_fold, by_repeat, which),
            )
            for name, which in members.items()
            if which.any()
        ],
        spearman=spearman,
        ceiling=spearman_ceiling(scored[known], left_out[known]),
        pearson=of_values,
    )


def _bias(difference: Floats, by_fold: Floats, by_repeat: Floats, which: NDArray[np.bool_]) -> Mean:
    value = float(difference[which].mean())
    samples = (
        difference[which],
        by_repeat[:, which].mean(axis=1),
        by_fold[:, which].mean(axis=1),
    )
    if min(map(len, samples)) < 2:
        return Mean(value=value, low=math.nan, high=math.nan)
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    freedom = np.array([len(sample) - 1 for sample in samples])
    total = float(variances.sum())
    # Welch and Satterthwaite's degrees of freedom.
    t = stats.t.ppf(0.975, total**2 / float((variances**2 / freedom).sum())) if total else 0.0
    half = float(t) * math.sqrt(total)
    return Mean(value=value, low=value - half, high=value + half)


def _correlations(
    groups: NDArray[np.str_],
    counts: Sequence[Floats],
    with_it: NDArray[np.bool_],
    without: NDArray[np.bool_],
    seed: int,
) -> tuple[Coefficient, Coefficient]:
    """Spearman's and Pearson's, of ranks and of values."""
    generator = np.random.default_rng(seed)
    by_repeat = with_it.astype(float) - without
    (R, K), F = by_repeat.shape, len(counts[0])
    in_groups = [np.flatnonzero(groups == name) for name in dict.fromkeys(groups.tolist())]

    def both(repeats: Floats, folds: Floats, rows: NDArray[np.int64]) -> tuple[float, float]:
        scored = memorization_of(*(folds @ count[:, rows] for count in counts))
        left_out = repeats @ by_repeat[:, rows] / repeats.sum()
        known = np.isfinite(scored)
        a, b = scored[known], left_out[known]
        return pearson(stats.rankdata(a), stats.rankdata(b)), pearson(a, b)

    def drawn(n: int) -> Floats:
        return np.bincount(generator.integers(n, size=n), minlength=n).astype(float)

    values = both(np.ones(R), np.ones(F), np.arange(K))
    replicates = [
        both(drawn(R), drawn(F), np.concatenate([generator.choice(g, len(g)) for g in in_groups]))
        for _ in range(REPLICATES)
    ]
    found = []
    for value, column in zip(values, zip(*replicates, strict=True), strict=True):
        low, high = correlation_interval(value, column)
        found.append(Coefficient(value=value, low=low, high=high))
    return found[0], found[1]


def _table(
    experiment: LeaveOneOut,
    ids: Sequence[str],
    counts: Sequence[Floats],
    with_it: NDArray[np.bool_],
    without: NDArray[np.bool_],
) -> pa.Table:
    n_in, correct_in, n_out, correct_out = (count.sum(axis=0) for count in counts)
    scored = difference_of_proportions(correct_in, n_in, correct_out, n_out)
    R = np.full(len(ids), len(with_it))
    left_out = difference_of_proportions(with_it.sum(axis=0), R, without.sum(axis=0), R)
    return pa.table(
        {
            "example_id": list(ids),
            "label": [experiment.labels[row] for row in experiment.rows],
            "group": list(experiment.groups),
            "memorization": scored.value,
            "memorization_low": scored.low,
            "memorization_high": scored.high,
            "leave_one_out": left_out.value,
            "leave_one_out_low": left_out.low,
            "leave_one_out_high": left_out.high,
        }
    )


def verdict_on_leave_one_out(found: LeftOut) -> Verdict:
    """In plain words: above, below, or no significant difference, and the rank correlation."""
    by_name = {bias.group: bias for bias in found.biases}
    one = by_name.get("random") or found.biases[0]
    parts = [
        f"{each.bias.value:+.3f} [{each.bias.low:+.3f}, {each.bias.high:+.3f}] of "
        f"{each.examples} {_described(each.group)}"
        for each in found.biases
        if each.group in GROUPS
    ]
    rho = found.spearman
    return Verdict(
        text=f"leave one out: memorization at subset ratio {found.experiment.scored_ratio:g} minus "
        f"memorization by leaving one out is {', '.join(parts)}; their rank correlation is "
        f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}], of at most {found.ceiling:.2f} with "
        "these ties",
        estimate=one.bias.value,
        low=one.bias.low,
        high=one.bias.high,
        not_shown="how the ranks of all examples agree: two thirds of these were chosen for their "
        "scores, and of most examples both values are near 0",
    )


def _described(group: str) -> str:
    return {
        "random": "random examples",
        "most memorized": "of the most memorized",
        "near 0.25": "with scores near 0.25",
    }[group]
