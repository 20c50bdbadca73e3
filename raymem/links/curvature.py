"""How memorization goes with curvature, and with the cheaper numbers any claim must beat.

In:  scores/examples.parquet and scores/folds.parquet of one epsilon.
Out: correlations over training examples, with intervals over trials and examples.

Shapes: F folds of whole blocks, N training examples, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from raymem.memorization import ratio
from raymem.store import Store

Floats = NDArray[np.float64]
# Beside curvature of held-out models (Theorem 5.1's "S without i"), what it must be better than.
MEASURES = (
    "curvature_out", "curvature_in", "curvature_paper_out", "curvature_paper_in",
    "loss_out", "loss_in", "gradient_norm_out", "gradient_norm_in",
)  # fmt: skip
REPLICATES = 300
# Of more examples, so many drawn ones: more only cost time.
MOST_EXAMPLES = 100_000
CONFIDENCE = 0.95
BINS = 10
# 1 - 0.8 is a little below 0.2; in its bin it belongs all the same.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A correlation and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Memorization against one measure, over training examples."""

    measure: str
    """Column of scores/examples.parquet."""
    spearman: Coefficient
    """Of ranks."""
    pearson: Coefficient
    """Of values."""
    examples: int
    """Training examples that have both."""
    folds: int
    """Folds the bootstrap drew from; with one, the interval is over examples only."""


def correlations(store: Store, *, seed: int = 0) -> dict[float, list[Correlation]]:
    """Memorization against each measure of MEASURES that the scores have, by epsilon.

    Intervals are a two-way bootstrap, over folds of whole blocks of trials and over examples, with
    the bootstrap's standard deviation of Fisher's z around the estimate: resampled folds are
    noisier than the trials are, which biases the replicates towards 0, not their spread.

    Empty where no trial measured curvature. Raises StoreError without scores.
    """
    scores, folds = store.scores(), store.scores("folds")
    if "curvature_out" not in scores.column_names:
        return {}
    found = {}
    for epsilon in sorted(set(scores["epsilon"].to_pylist())):
        here = _train_at(scores, epsilon)
        values = {name: _floats(here, name) for name in here.column_names if name in MEASURES}
        values = {name: column for name, column in values.items() if np.isfinite(column).any()}
        if any(name.startswith("curvature") for name in values):
            sums = _Sums(_train_at(folds, epsilon), list(values))
            mem = _floats(here, "memorization")
            found[epsilon] = _correlate(mem, values, sums, np.random.default_rng(seed))
    return found


def by_memorization(store: Store) -> dict[float, pa.Table]:
    """Means of the measures over bins of memorization, a tenth wide each, by epsilon.

    Columns: from, to, examples, and the mean over the bin's examples of each measure the scores
    have. Bins without examples are left out. Binned means hide the spread within bins: correlations
    of bins are far higher than those of examples.
    """
    scores = store.scores()
    if "curvature_out" not in scores.column_names:
        return {}
    found = {}
    for epsilon in sorted(set(scores["epsilon"].to_pylist())):
        here = _train_at(scores, epsilon)
        mem = _floats(here, "memorization")
        if not np.isfinite(_floats(here, "curvature_out")).any():
            continue
        number = np.clip(np.floor(np.nan_to_num(mem) * BINS + ROUNDING), -BINS, BINS - 1)
        rows = []
        for b in np.unique(number[np.isfinite(mem)]):
            inside = np.isfinite(mem) & (number == b)
            row = {"from": b / BINS, "to": (b + 1) / BINS, "examples": int(inside.sum())}
            for name in [name for name in MEASURES if name in here.column_names]:
                values = _floats(here, name)[inside]
                finite = values[np.isfinite(values)]
                row[name] = float(finite.mean()) if len(finite) else None
            rows.append(row)
        found[epsilon] = pa.Table.from_pylist(rows)
    return found


def _correlate(
    mem: Floats, values: dict[str, Floats], sums: _Sums, generator: np.random.Generator
) -> list[Correlation]:
    if len(mem) > MOST_EXAMPLES:
        chosen = np.sort(generator.choice(len(mem), MOST_EXAMPLES, replace=False))
    else:
        chosen = np.arange(len(mem))
    mem, values = mem[chosen], {name: column[chosen] for name, column in values.items()}
    replicates: dict[str, list[tuple[float, float]]] = {name: [] for name in values}
    for _ in range(REPLICATES):
        drawn = generator.integers(sums.n_folds, size=sums.n_folds)
        weights = np.bincount(drawn, minlength=sums.n_folds).astype(np.float64)
        rows = chosen[generator.integers(len(mem), size=len(mem))]
        resampled = sums.memorization(weights, rows)
        for name in values:
            replicates[name].append(_both(resampled, sums.mean(name, weights, rows)))
    found = []
    for name in [name for name in MEASURES if name in values]:
        estimate = _both(mem, values[name])
        spearman, pearson = (
            _interval(value, [pair[side] for pair in replicates[name]])
            for side, value in enumerate(estimate)
        )
        found.append(
            Correlation(
                measure=name,
                spearman=spearman,
                pearson=pearson,
                examples=int((np.isfinite(mem) & np.isfinite(values[name])).sum()),
                folds=sums.n_folds,
            )
        )
    return found


class _Sums:
    """Sums of folds, [F, N], as they are resampled."""

    def __init__(self, table: pa.Table, measures: Sequence[str]) -> None:
        self.n_folds = len(set(table["fold"].to_pylist()))
        self._sums = {
            name: _floats(table, name).reshape(self.n_folds, -1)
            for name in {
                *(f"{what}_{arm}" for what in ("n", "correct") for arm in ("in", "out")),
                *measures,
                *(_count(name) for name in measures),
            }
        }

    def memorization(self, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Of the examples `rows`, when folds count `weights` times."""
        right, n = (
            {arm: weights @ self._sums[f"{what}_{arm}"][:, rows] for arm in ("in", "out")}
            for what in ("correct", "n")
        )
        return ratio(right["in"], n["in"]) - ratio(right["out"], n["out"])

    def mean(self, name: str, weights: Floats, rows: NDArray[np.int64]) -> Floats:
        """Of a measure, the same."""
        # Folds without curvature have null sums and no count.
        total = weights @ np.nan_to_num(self._sums[name][:, rows])
        return ratio(total, weights @ np.nan_to_num(self._sums[_count(name)][:, rows]))


def _count(measure: str) -> str:
    """The column of folds that counts the trials in a measure's sum."""
    arm = measure.rpartition("_")[2]
    return f"n_{arm}" if measure.startswith("loss") else f"n_curvature_{arm}"


def _both(a: Floats, b: Floats) -> tuple[float, float]:
    """Spearman's and Pearson's coefficient over the pairs that are finite."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return math.nan, math.nan
    ranks = float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
    return ranks, float(np.corrcoef(a, b)[0, 1])


def _interval(value: float, replicates: Sequence[float]) -> Coefficient:
    if math.isnan(value) or np.isfinite(replicates).sum() < 2:
        return Coefficient(value=value, low=math.nan, high=math.nan)
    clipped = np.clip([value, *replicates], -1 + 1e-12, 1 - 1e-12)
    z, others = np.arctanh(clipped[0]), np.arctanh(clipped[1:])
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.nanstd(others, ddof=1)
    return Coefficient(value=value, low=float(np.tanh(z - half)), high=float(np.tanh(z + half)))


def _train_at(table: pa.Table, epsilon: float) -> pa.Table:
    here = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["epsilon"], epsilon))
    return table.filter(here)


def _floats(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].cast(pa.float64()).to_numpy()
    return values
