"""Memorization and measures when folds of trials are resampled: of one store, or of two joined.

Shapes: F folds, N training examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.links.column_arrays import Floats, floats
from raymem.scores import ratio
from raymem.scores.running_sums import IN, OUT, RunningSums

# Measures of training itself, and the trials that have them.
COUNTED_BY = {"cumulative_loss": "n_in", "forgetting_count": "n_in", "learning_epoch": "learned"}


def memorization_of(n_in: Floats, correct_in: Floats, n_out: Floats, correct_out: Floats) -> Floats:
    """Of counts in the order of COUNTS; NaN without trials in one arm."""
    return ratio(correct_in, n_in) - ratio(correct_out, n_out)


class Folds:
    """The training examples' rows of scores/folds.parquet at one epsilon: sums over F folds."""

    def __init__(self, table: pa.Table, measures: Sequence[str]) -> None:
        """`measures` are columns of scores/examples.parquet, p_wrong or wrong."""
        self.n_folds = len(set(table["fold"].to_pylist()))

        def column(name: str) -> Floats:
            return floats(table, name).reshape(self.n_folds, -1)

        self._outcomes = RunningSums(
            n=np.stack([column("n_out"), column("n_in")], 1),
            total={"correct": np.stack([column("correct_out"), column("correct_in")], 1)},
        )
        # Folds without curvature have null sums and no count.
        self._measured = {
            name: RunningSums(
                n=np.nan_to_num(column(_count(name))),
                total={name: np.nan_to_num(column(_sum(name)))},
            )
            for name in measures
        }

    @property
    def n_examples(self) -> int:
        """N."""
        return int(self._outcomes.n.shape[-1])

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
        return int((self._measured[name].n.sum(1) > 0).sum())

    @property
    def can_be_halved(self) -> bool:
        """Are there two folds?"""
        return self.n_folds > 1

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Of the examples `rows`, when folds count `weights` times; NaN without trials in one
        arm."""
        accuracy = _resampled(self._outcomes, weights, rows).mean("correct")
        difference: Floats = accuracy[IN] - accuracy[OUT]
        return difference

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Mean of a measure over the trials that have it, of the examples `rows`."""
        if name == "memorization":
            return self.memorization(weights, rows)
        mean = _resampled(self._measured[name], weights, rows).mean(name)
        return 1 - mean if "wrong" in name else mean


class FixedScores(Folds):
    """Published memorization and measures, [N]: nothing is known of their trials, so that they do
    not vary."""

    def __init__(self, memorization: Floats, values: Mapping[str, Floats] | None = None) -> None:
        self.n_folds, self._memorization, self._values = 1, memorization, dict(values or {})

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Folds."""
        return self._memorization[rows]

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Folds."""
        return self._values[name][rows]

    def folds_of(self, name: str) -> int:
        """See Folds."""
        return 1


class JoinedFolds(Folds):
    """Memorization of one store and measures of another: their folds are drawn independently.

    `places` are the rows of the second store that have the first one's examples, [N].
    """

    def __init__(self, first: Folds, second: Folds, places: NDArray[np.int64]) -> None:
        self.first, self.second, self.places = first, second, places
        self.n_folds = first.n_folds + second.n_folds

    def resampled(self, generator: np.random.Generator) -> Floats:
        """See Folds."""
        return np.concatenate([s.resampled(generator) for s in (self.first, self.second)])

    def half(self, generator: np.random.Generator) -> Floats:
        """See Folds."""
        return np.concatenate([s.half(generator) for s in (self.first, self.second)])

    def folds_of(self, name: str) -> int:
        """See Folds; of the second store."""
        return self.second.folds_of(name)

    @property
    def can_be_halved(self) -> bool:
        """Have both two folds?"""
        return self.first.can_be_halved and self.second.can_be_halved

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Folds; of the first store."""
        return self.first.memorization(weights[: self.first.n_folds], rows)

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """See Folds; of the second store."""
        return self.second.mean(name, weights[self.first.n_folds :], self.places[rows])


def _resampled(sums: RunningSums, weights: Floats, rows: NDArray[np.int64]) -> RunningSums:
    # To add up all examples is faster than to gather some, unless they are few.
    few = 8 * len(rows) < sums.n.shape[-1]
    return sums.at(rows).merged(weights) if few else sums.merged(weights).at(rows)


def _sum(measure: str) -> str:
    """The column of folds with a measure's sum."""
    return measure.replace("p_wrong", "p_true").replace("wrong", "correct")


def _count(measure: str) -> str:
    """The column of folds that counts the trials in a measure's sum."""
    arm = measure.rpartition("_")[2]
    if measure in COUNTED_BY:
        return COUNTED_BY[measure]
    return f"n_{arm}" if measure.startswith(("loss", "p_wrong", "wrong")) else f"n_curvature_{arm}"
