"""Split halves of a fleet: reliability, and correlations without the noise of estimation.

Memorization and a measure of out-models come from the same models and share their noise, which
inflates their correlation. Memorization of one half of the trials and the measure of the other
half share nothing but the examples.

Shapes: F folds, N training examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.links.column_arrays import Floats
from raymem.links.folds import Folds

HALVES = 20
# What curvature is compared with memorization at equal values of.
GIVEN = "loss_out"
FIELDS = ("reliability", "pearson", "slope", "given_loss")


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Of one measure; means over random splits of the folds, all NaN with one fold."""

    reliability: float
    """Of the measure over all folds, by Spearman and Brown's formula."""
    pearson: float
    """Disattenuated: across halves, over the square root of how each agrees with itself. Ranks have
    no such correction: their noise is neither additive nor independent of the value, and dividing
    by rank reliabilities gave .57 to .77 for 40 to 2,000 trials where the truth was .97."""
    slope: float
    """Of the measure on memorization, each half's memorization as the other's instrument."""
    given_loss: float
    """Partial Spearman given loss_out, curvature and the loss from one half and memorization from
    the other; NaN without the loss, and for measures that are not curvature."""


def in_halves(
    sums: Folds, names: Sequence[str], rows: NDArray[np.int64], generator: np.random.Generator
) -> dict[str, Halves]:
    """Of each measure, over the examples `rows`."""
    if not sums.can_be_halved:
        return dict.fromkeys(names, Halves(**dict.fromkeys(FIELDS, math.nan)))
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(HALVES):
        first = sums.half(generator)
        halves = (first, 1 - first)
        mem = [sums.memorization(weights, rows) for weights in halves]
        loss = [sums.mean(GIVEN, weights, rows) for weights in halves] if GIVEN in names else None
        for name in names:
            measure = [sums.mean(name, weights, rows) for weights in halves]
            is_curvature = name.startswith("curvature")
            given = _given(mem, measure, loss) if loss and is_curvature else math.nan
            found[name].append((*_one_split(mem, measure), given))
    return {name: _mean_of(splits) for name, splits in found.items()}


def _one_split(mem: Sequence[Floats], measure: Sequence[Floats]) -> tuple[float, ...]:
    """Of two halves: agreement of the measure, of memorization, and across; covariances across and
    of memorization."""
    finite = np.logical_and.reduce([np.isfinite(values) for values in (*mem, *measure)])
    if finite.sum() < 3:
        return (math.nan,) * 5
    a, b, x, y = (values[finite] for values in (*mem, *measure))
    across = (_covariance(y, a) + _covariance(x, b)) / 2
    crossed = (pearson(a, y) + pearson(b, x)) / 2
    return pearson(x, y), pearson(a, b), crossed, across, _covariance(a, b)


def _given(mem: Sequence[Floats], measure: Sequence[Floats], loss: Sequence[Floats]) -> float:
    """Mean of both ways: memorization of one half, the rest of the other."""
    return (
        partial_spearman(mem[0], measure[1], loss[1])
        + partial_spearman(mem[1], measure[0], loss[0])
    ) / 2


def _mean_of(splits: Sequence[tuple[float, ...]]) -> Halves:
    of_x, of_mem, across, covariance, shared, given = (
        float(np.mean(column)) for column in zip(*splits, strict=True)
    )
    return Halves(
        reliability=2 * of_x / (1 + of_x) if of_x > -1 else math.nan,
        pearson=across / math.sqrt(of_x * of_mem) if of_x > 0 and of_mem > 0 else math.nan,
        slope=covariance / shared if shared > 0 else math.nan,
        given_loss=given,
    )


def partial_spearman(a: Floats, b: Floats, given: Floats) -> float:
    """Spearman correlation of a and b after the ranks of `given` are regressed out, [N] each.

    Over the examples that have all three; NaN with fewer than three, or if nothing is left to vary.
    """
    known = np.isfinite(a) & np.isfinite(b) & np.isfinite(given)
    if known.sum() < 3:
        return math.nan
    x, y, z = (stats.rankdata(values[known]) for values in (a, b, given))
    of_x, of_y = pearson(x, z), pearson(y, z)
    left = (1 - of_x**2) * (1 - of_y**2)
    return (pearson(x, y) - of_x * of_y) / math.sqrt(left) if left > 1e-12 else math.nan


def _covariance(a: Floats, b: Floats) -> float:
    return float(np.mean((a - a.mean()) * (b - b.mean())))


def pearson(a: Floats, b: Floats) -> float:
    """Pearson's correlation; NaN if one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else math.nan
