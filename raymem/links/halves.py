"""What two halves of a fleet say of each other: reliability, and what is left without noise.

Memorization and a measure of out-models come from the same models and share their noise, so that
what they have in common in one half says too much. One half's memorization and the other half's
measure share nothing but the examples.

Shapes: F folds, N training examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.links.rows import Floats
from raymem.links.sums import Sums

HALVES = 20


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Of one measure; means over random splits of the folds, all NaN with one fold."""

    reliability: float
    """Of the measure over all folds, by Spearman and Brown's formula."""
    pearson: float
    """Correlation with memorization without the noise of either."""
    spearman: float
    """The same of ranks."""
    slope: float
    """Of the measure on memorization, each half's memorization as the other's instrument."""


def in_halves(
    sums: Sums, names: Sequence[str], rows: NDArray[np.int64], generator: np.random.Generator
) -> dict[str, Halves]:
    """Of each measure, over the examples `rows`."""
    nothing = Halves(reliability=math.nan, pearson=math.nan, spearman=math.nan, slope=math.nan)
    if not sums.can_be_halved:
        return dict.fromkeys(names, nothing)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(HALVES):
        first = sums.half(generator)
        mem = [sums.memorization(weights, rows) for weights in (first, 1 - first)]
        for name in names:
            measure = [sums.mean(name, weights, rows) for weights in (first, 1 - first)]
            found[name].append(_one_split(mem, measure))
    return {name: _mean_of(splits) for name, splits in found.items()}


def _one_split(mem: Sequence[Floats], measure: Sequence[Floats]) -> tuple[float, ...]:
    """Of two halves: agreement of the measure, of memorization, and across; plain and of ranks;
    covariances across and of memorization."""
    finite = np.logical_and.reduce([np.isfinite(values) for values in (*mem, *measure)])
    if finite.sum() < 3:
        return (math.nan,) * 8
    a, b, x, y = (values[finite] for values in (*mem, *measure))
    ranked = [stats.rankdata(values) for values in (a, b, x, y)]
    plain = _agreement(a, b, x, y)
    across = (_covariance(y, a) + _covariance(x, b)) / 2
    return (*plain, *_agreement(*ranked), across, _covariance(a, b))


def _agreement(a: Floats, b: Floats, x: Floats, y: Floats) -> tuple[float, float, float]:
    return pearson(x, y), pearson(a, b), (pearson(a, y) + pearson(b, x)) / 2


def _mean_of(splits: Sequence[tuple[float, ...]]) -> Halves:
    of_x, of_mem, across, of_x_ranks, of_mem_ranks, across_ranks, covariance, shared = (
        float(np.mean(column)) for column in zip(*splits, strict=True)
    )
    return Halves(
        reliability=2 * of_x / (1 + of_x) if of_x > -1 else math.nan,
        pearson=_without_noise(across, of_x, of_mem),
        spearman=_without_noise(across_ranks, of_x_ranks, of_mem_ranks),
        slope=covariance / shared if shared > 0 else math.nan,
    )


def _without_noise(across: float, of_x: float, of_mem: float) -> float:
    return across / math.sqrt(of_x * of_mem) if of_x > 0 and of_mem > 0 else math.nan


def _covariance(a: Floats, b: Floats) -> float:
    return float(np.mean((a - a.mean()) * (b - b.mean())))


def pearson(a: Floats, b: Floats) -> float:
    """Pearson's correlation; NaN if one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else math.nan
