"""The removal experiment: does accuracy fall more without memorized examples than without others?

In:  the trials of a removal plan (see `raymem.plan.Removal`), or what they get right.
Out: `Removed`: accuracies by arm and size, differences, one test for the whole grid, a verdict.

Shapes: R repeats, A arms, K sizes, M test examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from raymem.encoding import JsonObject
from raymem.errors import StoreError
from raymem.experiments import ARMS, Arm, Removal
from raymem.links.column_arrays import Floats
from raymem.links.verdicts import Verdict
from raymem.store import Store, TrialKey

LEVEL = 0.05
# Fewer can never be significant: the signs of R differences agree by chance with 2^(1 - R).
LEAST_REPEATS = 6
CONTROLS: tuple[Arm, ...] = ("random", "same-classes")
NAMES: dict[Arm, str] = {
    "memorized": "the most memorized",
    "random": "random examples",
    "same-classes": "random examples of the same classes",
}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over repeats with its 95% interval (t)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> Mean:
        """Of values [R]."""
        mean, R = float(values.mean()), len(values)
        if R < 2:
            return cls(value=mean, low=math.nan, high=math.nan)
        half = float(stats.t.ppf(0.975, R - 1) * values.std(ddof=1) / math.sqrt(R))
        return cls(value=mean, low=mean - half, high=mean + half)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How much more accuracy falls without the most memorized examples than without a control's."""

    control: Arm
    at_size: list[Mean]
    """The difference of accuracies, control minus memorized, at each size; intervals are of one
    size each."""
    slope: Mean
    """By how much more accuracy falls per example removed: the test's quantity, over all sizes."""
    p_value: float
    """Two-sided, of slope 0; NaN with fewer than six repeats."""
    stderr_test: float
    """Standard error of `slope` over other test examples; not in its interval."""


@dataclass(frozen=True, kw_only=True)
class RemovalEffect(JsonObject):
    """The experiment measured on one set of test examples."""

    sizes: tuple[int, ...]
    repeats: int
    test_examples: int
    accuracy_all: Mean
    """Trained on all examples."""
    accuracy: dict[Arm, list[Mean]]
    """By arm, at each size."""
    falls: dict[Arm, Mean]
    """Fall of accuracy per example removed, by arm."""
    contrasts: list[Contrast]
    """One for each control."""

    @property
    def p_value(self) -> float:
        """Of the verdict: the larger one, as both controls must be beaten (intersection-union)."""
        return float(np.max([contrast.p_value for contrast in self.contrasts]))

    def json_fields(self) -> Mapping[str, object]:
        """As removal.json has it; its sizes are those of the experiment."""
        fields = {k: v for k, v in vars(self).items() if k not in ("sizes", "falls")}
        return {**fields, "fall_per_example": self.falls, "p_value": self.p_value}


def removal_effect(sizes: Sequence[int], correct: NDArray[np.bool_]) -> RemovalEffect:
    """The effect from what trials get right: `correct` is bool [R, A, K + 1, M].

    Arms are in the order of ARMS; the first of the K + 1 is size 0, one trial for all arms.

    A repeat's slope is that of a line through the origin in the number of removed examples:
    sum_k k d_k / sum_k k^2, with d_k the difference of two accuracies. Intervals are t intervals of
    means over repeats, which say how sure the mean difference between the most memorized examples
    and random ones is. The test asks more. The most memorized are one set; a single random set too
    differs from the mean of many, surely so with enough repeats. So its standard error has the
    variance of the control's slope over single trials, random sets and seeds together:

        SE^2 = var(control) + var(control - memorized) / R

    with R - 1 degrees of freedom, as of a prediction. It is of the slope, one for the whole grid,
    and conservative, since the most memorized are averaged over seeds.

    >>> right = np.ones((6, 3, 2, 10), bool)
    >>> right[:, 0, 1, 0] = False  # without one memorized example, a test example is lost
    >>> round(removal_effect([1], right).contrasts[0].slope.value, 6)
    0.1
    """
    k = np.asarray(sizes, float)
    weights = k / (k**2).sum()
    accuracy = correct.mean(axis=3)
    fall = accuracy[:, :, :1] - accuracy[:, :, 1:]
    slopes = fall @ weights
    return RemovalEffect(
        sizes=tuple(sizes),
        repeats=len(correct),
        test_examples=correct.shape[3],
        accuracy_all=Mean.of(accuracy[:, 0, 0]),
        accuracy={
            arm: [Mean.of(accuracy[:, a, 1 + i]) for i in range(len(k))]
            for a, arm in enumerate(ARMS)
        },
        falls={arm: Mean.of(slopes[:, a]) for a, arm in enumerate(ARMS)},
        contrasts=[_contrast(control, fall, slopes, correct, weights) for control in CONTROLS],
    )


def _contrast(
    control: Arm, fall: Floats, slopes: Floats, correct: NDArray[np.bool_], weights: Floats
) -> Contrast:
    """fall is [R, A, K], slopes [R, A], weights [K]."""
    a, m = ARMS.index(control), ARMS.index("memorized")
    per_test = (correct[:, a, 1:].mean(axis=0) - correct[:, m, 1:].mean(axis=0)).T @ weights
    M = len(per_test)
    # Without the trial on all examples, which both arms share.
    alone = correct[:, a, 1:].mean(axis=2) @ weights
    return Contrast(
        control=control,
        at_size=[Mean.of(fall[:, m, i] - fall[:, a, i]) for i in range(len(weights))],
        slope=Mean.of(slopes[:, m] - slopes[:, a]),
        p_value=_p_value(slopes[:, m] - slopes[:, a], alone),
        stderr_test=float(per_test.std(ddof=1) / math.sqrt(M)) if M > 1 else math.nan,
    )


def _p_value(differences: Floats, control: Floats) -> float:
    """Two-sided; both [R]."""
    R, mean = len(differences), float(differences.mean())
    if R < LEAST_REPEATS:
        return math.nan
    error = math.sqrt(control.var(ddof=1) + differences.var(ddof=1) / R)
    p = 2 * float(stats.t.sf(abs(mean) / error, R - 1)) if error else float(mean == 0)
    # Accuracies are counts: a few equal differences prove no more than their signs do.
    return max(p, 2.0 ** (1 - R))


@dataclass(frozen=True, kw_only=True)
class Removed(JsonObject):
    """Result of a removal experiment: test accuracy without the most memorized examples and without
    random ones."""

    url: str
    removal: Removal
    all_test: RemovalEffect
    """On all test examples."""
    apart: RemovalEffect | None
    """Without test examples that have a near duplicate in the training set; None if none is left.
    The verdict is on these."""
    copies: int
    """How many test examples have one."""
    incomplete: int
    """Repeats that lack a trial, and do not count."""
    accuracy_train: float
    """Mean training accuracy of the trials."""

    @property
    def headline(self) -> RemovalEffect:
        """The effect that the verdict is on."""
        return self.apart or self.all_test

    @property
    def verdict(self) -> Verdict:
        """Does accuracy fall more, and by how much per example removed?"""
        return verdict_on_removal(self.headline)

    def least_memorization(self, size: int) -> float:
        """The smallest memorization among the `size` most memorized."""
        return self.removal.memorization[size - 1]

    def json_fields(self) -> Mapping[str, object]:
        """removal.json."""
        sizes = self.removal.sizes
        return {
            "sizes": sizes,
            "least_memorization": [self.least_memorization(size) for size in sizes],
            "scored_study": self.removal.scored_study,
            "scored_trials": self.removal.scored_trials,
            "level": LEVEL,
            "test_examples_with_near_duplicates_in_training": self.copies,
            "incomplete_repeats": self.incomplete,
            "accuracy_train": self.accuracy_train,
            "without_near_duplicates": self.apart,
            "all_test_examples": self.all_test,
            "verdict": self.verdict,
        }


def find_removal(store: Store) -> Removed:
    """What the removal experiment in `store` found, from its trials.

    Raises StoreError if the store is of another kind of study or has no whole repeat.
    """
    plan = store.plan()
    removal = plan.removal
    if removal is None:
        raise StoreError(
            f"{store.url} is no removal experiment but a study of {plan}; run "
            "jobs/removal_digits.py, with --scores-from to use the scores of this one"
        )
    whole, begun = whole_repeats(store)
    if not whole:
        raise StoreError(
            f"{store.url} has no whole repeat of {plan.block} trials yet; run its job, which "
            "trains what is missing"
        )
    read = [
        [read_trial(store, trial) for trial in range(r * plan.block, (r + 1) * plan.block)]
        for r in whole
    ]
    correct = np.stack([_by_arm([right[plan.n :] for right, _ in trials]) for trials in read])
    copies = _near_training(store)
    return Removed(
        url=store.url,
        removal=removal,
        all_test=removal_effect(removal.sizes, correct),
        apart=None if copies.all() else removal_effect(removal.sizes, correct[..., ~copies]),
        copies=int(copies.sum()),
        incomplete=len(begun) - len(whole),
        accuracy_train=float(np.mean([fit for trials in read for _, fit in trials])),
    )


def whole_repeats(store: Store) -> tuple[list[int], list[int]]:
    """Repeats of an experiment that have all their trials, and those that have any."""
    block = store.plan().block
    done = {key.trial for key in store.done() if math.isinf(key.epsilon)}
    begun = sorted({trial // block for trial in done})
    return [r for r in begun if done.issuperset(range(r * block, (r + 1) * block))], begun


def read_trial(store: Store, trial: int) -> tuple[NDArray[np.bool_], float]:
    """What one trial gets right, training examples first, bool [N + M], and its accuracy on its
    subset."""
    table = store.trial(TrialKey(math.inf, trial), ["in_subset", "correct"])
    N = table.num_rows - table["in_subset"].null_count
    correct: NDArray[np.bool_] = table["correct"].to_numpy()
    inside = table["in_subset"].slice(0, N).to_numpy()
    return correct, float(correct[:N][inside].mean())


def _by_arm(rows: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The trials of one repeat as bool [A, K + 1, M]; see `Removal.cell`."""
    A = len(ARMS)
    return np.stack([np.stack([rows[0], *rows[1 + a :: A]]) for a in range(A)])


def _near_training(store: Store) -> NDArray[np.bool_]:
    """Which test examples have a near duplicate in the training set: bool [M]."""
    index = store.examples()
    groups, split = index["near_duplicate_group"], index["split"]
    of_train = pc.drop_null(groups.filter(pc.equal(split, "train"))).combine_chunks()
    of_test = groups.filter(pc.equal(split, "test")).combine_chunks()
    near: NDArray[np.bool_] = pc.is_in(of_test, value_set=of_train, skip_nulls=True).to_numpy(
        zero_copy_only=False
    )
    return near


def verdict_on_removal(effect: RemovalEffect) -> Verdict:
    """In plain words: more, less, or no significant difference, and how much per example."""
    if effect.repeats < LEAST_REPEATS:
        return Verdict(
            text=f"removal: not known, a test needs {LEAST_REPEATS} repeats and there are "
            f"{effect.repeats}; raise --repeats"
        )
    slopes = [contrast.slope for contrast in effect.contrasts]
    signs = {np.sign(slope.value) for slope in slopes}
    falls = "does not fall significantly more or less"
    if effect.p_value < LEVEL and len(signs) == 1:
        falls = "falls more" if slopes[0].value > 0 else "falls less"
    against = ", ".join(
        f"by {percentage_points(contrast.slope)} more than without {NAMES[contrast.control]}"
        for contrast in effect.contrasts
    )
    weakest = min(slopes, key=lambda slope: abs(slope.value))
    return Verdict(
        text=f"removal: test accuracy {falls} without the most memorized examples than without as "
        f"many random ones (p = {effect.p_value:.2g}, both controls, all sizes): per example "
        f"removed it falls by {percentage_points(effect.falls['memorized'])} percentage points, "
        f"{against}",
        estimate=weakest.value,
        low=weakest.low,
        high=weakest.high,
        not_shown="that the examples are needed because they are memorized (rare and atypical "
        "examples are both), that every one of them is needed, or that the same holds for other "
        "test images, recipes or sizes; intervals are over seeds and random sets",
    )


def percentage_points(mean: Mean) -> str:
    """A difference of accuracies with its interval, in percentage points.

    >>> percentage_points(Mean(value=0.001, low=-0.0002, high=0.0022))
    '0.1000 [-0.0200, 0.2200]'
    """
    return f"{100 * mean.value:.4f} [{100 * mean.low:.4f}, {100 * mean.high:.4f}]"
