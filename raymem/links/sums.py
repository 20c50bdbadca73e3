"""Sums of folds as they are resampled: of one store, or of two that are joined.

Shapes: F folds, N training examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.experiments import COUNTS
from raymem.links.column_arrays import Floats, floats
from raymem.scores import ratio

# Measures of training itself, and the trials that have them.
COUNTED_BY = {"cumulative_loss": "n_in", "forgetting_count": "n_in", "learning_epoch": "learned"}


def memorization_of(n_in: Floats, correct_in: Floats, n_out: Floats, correct_out: Floats) -> Floats:
    """Of counts in the order of COUNTS; NaN without trials in one arm."""
    return ratio(correct_in, n_in) - ratio(correct_out, n_out)


class Sums:
    """Sums of folds, [F, N], as they are resampled."""

    def __init__(self, table: pa.Table, measures: Sequence[str]) -> None:
        self.n_folds = len(set(table["fold"].to_pylist()))
        self._sums = {
            # Folds without curvature have null sums and no count.
            name: np.nan_to_num(floats(table, name).reshape(self.n_folds, -1))
            for name in {
                *(f"{what}_{arm}" for what in ("n", "correct") for arm in ("in", "out")),
                *map(_sum, measures),
                *map(_count, measures),
            }
        }

    @property
    def n_examples(self) -> int:
        """N."""
        return int(self._sums["n_in"].shape[1])

    def resampled(self, generator: np.random.Generator) -> Floats:
        """How often each fold counts in a bootstrap replicate, [F]."""
        drawn = generator.integers(self.n_folds, size=self.n_folds)
        return np.bincount(drawn, minlength=self.n_folds).astype(np.float64)

    def half(self, generator: np.random.Generator) -> Floats:
        """1 for the folds of a random half, [F]."""
        first = np.zeros(self.n_folds)
        first[generator.permutation(self.n_folds)[: self.n_folds // 2]] = 1
        return first

    def folds_of(self, name: str) -> int:
        """In how many folds a measure was measured."""
        if name == "memorization":
            return self.n_folds
        return int((self._sums[_count(name)].sum(1) > 0).sum())

    @property
    def can_be_halved(self) -> bool:
        """Are there two folds?"""
        return self.n_folds > 1

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Of the examples `rows`, when folds count `weights` times."""
        return memorization_of(*(self._total(name, weights, rows) for name in COUNTS))

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Of a measure, the same."""
        if name == "memorization":
            return self.memorization(weights, rows)
        mean = ratio(
            self._total(_sum(name), weights, rows), self._total(_count(name), weights, rows)
        )
        return 1 - mean if "wrong" in name else mean

    def _total(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        # To add up all examples is faster than to gather some, unless they are few.
        sums = self._sums[name]
        few = 8 * len(rows) < sums.shape[1]
        total: Floats = weights @ sums[:, rows] if few else (weights @ sums)[rows]
        return total


class FixedSums(Sums):
    """Published memorization and measures, [N]: nothing is known of their trials, so that they do
    not vary."""

    def __init__(self, memorization: Floats, values: Mapping[str, Floats] | None = None) -> None:
        self.n_folds, self._memorization, self._values = 1, memorization, dict(values or {})

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Sums."""
        return self._memorization[rows]

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Sums."""
        return self._values[name][rows]

    def folds_of(self, name: str) -> int:
        """See Sums."""
        return 1


class JoinedSums(Sums):
    """Memorization of one store and measures of another: their folds are drawn independently.

    `places` are the rows of the second store that have the first one's examples, [N].
    """

    def __init__(self, first: Sums, second: Sums, places: NDArray[np.int64]) -> None:
        self.first, self.second, self.places = first, second, places
        self.n_folds = first.n_folds + second.n_folds

    def resampled(self, generator: np.random.Generator) -> Floats:
        """See Sums."""
        return np.concatenate([s.resampled(generator) for s in (self.first, self.second)])

    def half(self, generator: np.random.Generator) -> Floats:
        """See Sums."""
        return np.concatenate([s.half(generator) for s in (self.first, self.second)])

    def folds_of(self, name: str) -> int:
        """See Sums; of the second store."""
        return self.second.folds_of(name)

    @property
    def can_be_halved(self) -> bool:
        """Have both two folds?"""
        return self.first.can_be_halved and self.second.can_be_halved

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Sums; of the first store."""
        return self.first.memorization(weights[: self.first.n_folds], rows)

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Sums; of the second store."""
        return self.second.mean(name, weights[self.first.n_folds :], self.places[rows])


def _sum(measure: str) -> str:
    """The column of folds with a measure's sum."""
    return measure.replace("p_wrong", "p_true").replace("wrong", "correct")


def _count(measure: str) -> str:
    """The column of folds that counts the trials in a measure's sum."""
    arm = measure.rpartition("_")[2]
    if measure in COUNTED_BY:
        return COUNTED_BY[measure]
    return f"n_{arm}" if measure.startswith(("loss", "p_wrong", "wrong")) else f"n_curvature_{arm}"
