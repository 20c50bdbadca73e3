"""Experiments that leave chosen examples out of the training set, trial by trial.

In:  scores of an earlier study, as `raymem.links.removal_by_scores` and `leave_one_out_by_scores`
     read them.
Out: what each trial of a plan leaves out. Trials come in repeats, whose trials have the same seeds
     and of which the first trains on everything.

Shapes: N training examples, K examples left out one by one, F folds of scoring trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raymem.encoding import JsonObject
from raymem.errors import PlanError

Arm = Literal["memorized", "random", "same-classes"]
# In the order in which a removal experiment trains them.
ARMS: tuple[Arm, ...] = get_args(Arm)
Group = Literal["random", "most memorized", "near 0.25"]
GROUPS: tuple[Group, ...] = get_args(Group)
COUNTS = ("n_in", "correct_in", "n_out", "correct_out")

# One Philox counter range for each use; a new use takes a new number, so old masks never move.
STREAM_BALANCED, STREAM_FIXED_SIZE, STREAM_REMOVAL, STREAM_LEAVE_ONE_OUT = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Removal(JsonObject):
    """What the trials of a removal experiment leave out (Feldman & Zhang 2020, section 4, fig. 2).

    Trials come in repeats of 1 + 3 K trials, K the number of sizes: one on all training examples,
    then for each size k one without the k most memorized examples, one without k random ones, and
    one without k random ones of the same classes (as many of each class as the most memorized).
    All trials of a repeat have the same seeds; each repeat draws other random examples, and those
    of a smaller size are among those of a larger one.

    Raises PlanError if the sizes or the ranking make no sense.

    >>> removal = Removal(
    ...     sizes=(1, 2), ranking=(7, 3), memorization=(0.9, 0.8), labels=(0, 1) * 5,
    ...     scored_study="", scored_trials="0-199",
    ... )
    >>> [removal.cell(trial) for trial in (0, 1, 6, 7)]
    [(0, None, 0), (0, 'memorized', 1), (0, 'same-classes', 2), (1, None, 0)]
    """

    sizes: tuple[int, ...]
    """How many examples are left out, increasing."""
    ranking: tuple[int, ...]
    """Rows of the most memorized training examples, the most memorized first: as many as the
    largest size."""
    memorization: tuple[float, ...]
    """Their estimated memorization."""
    labels: tuple[int, ...]
    """Labels of all N training examples."""
    scored_study: str
    """Hash of the study whose trials gave the ranking."""
    scored_trials: str
    """Those trials, such as "0-199". None of them is a trial of this experiment."""

    def __post_init__(self) -> None:
        for name in ("sizes", "ranking", "labels"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        memorization = tuple(float(value) for value in self.memorization)
        object.__setattr__(self, "memorization", memorization)
        if not self.sizes or list(self.sizes) != sorted({*self.sizes}) or self.sizes[0] < 1:
            raise PlanError(
                f"sizes must be numbers of examples from 1 on, each larger than the one before, "
                f"got {', '.join(map(str, self.sizes)) or 'none'}; take for example 10,20,40,80"
            )
        check_sizes(self.sizes, len(self.labels))
        if not len(self.ranking) == len(self.memorization) == self.sizes[-1]:
            raise PlanError(
                f"a ranking of {len(self.ranking):,} examples and {len(self.memorization):,} "
                f"values of memorization do not fit the largest size, {self.sizes[-1]:,}; give "
                "that many of each"
            )
        n = len(self.labels)
        if len({*self.ranking}) != len(self.ranking) or not all(0 <= i < n for i in self.ranking):
            raise PlanError(f"the ranking must name rows in 0..{n - 1}, and none twice")

    def __str__(self) -> str:
        return f"removal experiment, k = {', '.join(map(str, self.sizes))}"

    @property
    def block(self) -> int:
        """Trials of one repeat."""
        return 1 + len(ARMS) * len(self.sizes)

    def cell(self, trial: int) -> tuple[int, Arm | None, int]:
        """Repeat, arm and size of a trial; arm None and size 0: nothing is left out."""
        repeat, slot = divmod(trial, self.block)
        if slot == 0:
            return repeat, None, 0
        size, arm = divmod(slot - 1, len(ARMS))
        return repeat, ARMS[arm], self.sizes[size]

    def left_out(self, trial: int, seed: int) -> NDArray[np.int64]:
        """Rows that `trial` does not train on, of a plan with this seed: int [k]."""
        repeat, arm, k = self.cell(trial)
        ranked = np.asarray(self.ranking[:k], np.int64)
        if arm is None or arm == "memorized":
            return ranked
        draw = len(ARMS) * repeat + ARMS.index(arm)
        keys = philox(seed, STREAM_REMOVAL, draw).random_raw(len(self.labels))
        order = np.argsort(keys, kind="stable")
        if arm == "random":
            return order[:k]
        labels = np.asarray(self.labels)
        classes, wanted = np.unique(labels[ranked], return_counts=True)
        of_order = labels[order]
        return np.concatenate(
            [order[of_order == c][:n] for c, n in zip(classes, wanted, strict=True)]
        )


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(JsonObject):
    """Memorization by its definition, of K examples (Feldman 2019): all others are trained on.

    Trials come in repeats of 1 + K trials with the same seeds: one on all training examples, then
    one without each of `rows`. `COUNTS` of the scoring trials, [F][K] each, are what the result is
    compared with; those trials had no part in choosing the examples, so that a score that is high
    by chance does not look like bias.

    Raises PlanError if rows, groups or counts make no sense.

    >>> experiment = LeaveOneOut(
    ...     rows=(4, 1), groups=("random", "most memorized"), labels=(0, 1) * 5,
    ...     n_in=((14, 14),), correct_in=((14, 14),), n_out=((6, 6),), correct_out=((6, 1),),
    ...     scored_ratio=0.7, scored_study="", scored_trials="20-39", chosen_by="0-19",
    ... )
    >>> [experiment.left_out(trial, seed=0).tolist() for trial in (0, 1, 2, 3)]
    [[], [4], [1], []]
    """

    rows: tuple[int, ...]
    """Rows of the examples that are left out, one after the other."""
    groups: tuple[Group, ...]
    """Why each was chosen."""
    labels: tuple[int, ...]
    """Labels of all N training examples."""
    n_in: tuple[tuple[int, ...], ...]
    """Scoring trials that trained on an example, by fold and example."""
    correct_in: tuple[tuple[int, ...], ...]
    """Of these, trials that are right on it."""
    n_out: tuple[tuple[int, ...], ...]
    """Scoring trials that did not train on it."""
    correct_out: tuple[tuple[int, ...], ...]
    """Of these, trials that are right on it."""
    scored_ratio: float
    """Subset ratio of the scoring trials."""
    scored_study: str
    """Hash of their study."""
    scored_trials: str
    """The scoring trials, such as "20-39"."""
    chosen_by: str
    """The trials of the same study that chose the examples, none of which is a scoring trial."""

    def __post_init__(self) -> None:
        for name in ("rows", "labels"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        object.__setattr__(self, "groups", tuple(self.groups))
        K, N = len(self.rows), len(self.labels)
        if not K or len({*self.rows}) != K or not all(0 <= row < N for row in self.rows):
            raise PlanError(f"rows must name at least one row in 0..{N - 1}, and none twice")
        if N < 2:
            raise PlanError("one of two training examples or more can be left out, got one")
        if len(self.groups) != K or not {*self.groups} <= {*GROUPS}:
            raise PlanError(f"give each of {K} examples one of the groups {', '.join(GROUPS)}")
        for name in COUNTS:
            counts = tuple(tuple(int(n) for n in fold) for fold in getattr(self, name))
            if len(counts) != len(self.n_in) or any(len(fold) != K for fold in counts):
                raise PlanError(f"{name} must have a number for each fold and example, [F][{K}]")
            object.__setattr__(self, name, counts)

    def __str__(self) -> str:
        return f"leave-one-out experiment, {len(self.rows)} examples"

    @property
    def block(self) -> int:
        """Trials of one repeat."""
        return 1 + len(self.rows)

    def left_out(self, trial: int, seed: int) -> NDArray[np.int64]:
        """Rows that `trial` does not train on: int [0] or [1]."""
        slot = trial % self.block
        return np.asarray(self.rows[slot - 1 : slot] if slot else (), np.int64)

    def counts(self, name: str) -> NDArray[np.float64]:
        """One of `COUNTS`: [F, K]."""
        return np.asarray(getattr(self, name), np.float64)


Experiment = Removal | LeaveOneOut


def check_sizes(sizes: Sequence[int], n: int) -> None:
    """Raises PlanError if so many cannot be left out of `n` training examples."""
    if max(sizes) >= n:
        raise PlanError(
            f"{max(sizes):,} examples cannot be left out of {n:,} training examples and leave one; "
            "take smaller sizes"
        )


def philox(seed: int, stream: int, index: int) -> np.random.Philox:
    """Philox4x64-10 (Salmon et al. 2011) keyed by (seed, stream), counting from (0, index).

    Only its raw 64-bit output is used: a published algorithm, while numpy's distributions and
    permutations may change between versions (NEP 19).
    """
    counter = np.array([0, index, 0, 0], np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, stream], np.uint64))
