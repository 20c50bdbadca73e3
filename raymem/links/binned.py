"""The paper's figure of link 1: memorization in bins, mean curvature in each, and its fits.

Ravikumar et al. 2024, section 6.3: 50 bins of width 0.02. Means of bins hide the spread within
them, so that lines through bins fit far better than examples do: read them beside the correlations
over examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from raymem.links.column_arrays import ROUNDING, Floats

WIDTH = 0.02
# A bin of fewer examples is no mean.
SMALLEST_BIN = 20


@dataclass(frozen=True, kw_only=True)
class Line:
    """measure = slope x + intercept, slope not negative, by least squares over bins."""

    slope: float
    intercept: float
    r_squared: float
    """Of the means of bins; NaN if they do not vary."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """measure = slope x + per_example n + intercept, neither coefficient negative, over bins."""

    slope: float
    per_example: float
    intercept: float
    r_squared: float
    """Of the means of bins; NaN if they do not vary."""


@dataclass(frozen=True, kw_only=True)
class PaperBins:
    """A measure in bins of memorization."""

    measure: str
    low: Floats
    """Lower ends, [bins]; bins without examples are left out."""
    examples: NDArray[np.int64]
    memorization: Floats
    """Mean of the bin."""
    mean: Floats
    """Mean of the measure."""
    straight: Line | None
    """x is memorization, bins count alike, as in the paper. None with fewer than three bins."""
    equation_15: Line | None
    """x is memorization / sqrt(n), n the bin's examples: the loss bound of each bin as eq. 15 of
    the paper has it. In this fit and the next two the number of examples in a bin is part of the
    regressor, and explains by itself."""
    imagenet_notebook: Line | None
    """x is memorization sqrt(n): the fit that the paper's ImageNet notebook computes."""
    cifar100_notebook: Plane | None
    """x is memorization sqrt(n), and n is a second regressor: the fit that the paper's CIFAR-100
    notebook computes."""
    weighted: Line | None
    """x is memorization; bins count as their examples, those below 20 are left out."""
    crossed: Crossed | None = None
    """The same examples, binned by one half of the trials, means and line from the other. None
    with one block of trials."""


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """Bins that noise does not fill: examples are sorted into them by memorization in one half of
    the trials; what is in them is read from the other half. Noise that puts an example into a high
    bin is then not in that bin's means, and the line's slope is hardly flattened (Wald's grouping):
    by the noise that is left in a mean of 20 examples or more."""

    memorization: Floats
    """Mean of the bin in the other half, [bins]; bins below 20 examples are left out."""
    mean: Floats
    """Mean of the measure in the other half."""
    line: Line | None
    """Bins count as their examples. None with fewer than three bins."""


def crossed(first: Floats, second: Floats, values: Floats) -> Crossed:
    """Examples binned by `first`; means of `second` (memorization too) and `values`; [N] each.

    >>> rng = np.random.default_rng(0)
    >>> mem = np.repeat(np.linspace(0, 1, 60), 1000)
    >>> a, b = (mem + rng.normal(0, 0.3, len(mem)) for _ in range(2))
    >>> round(crossed(a, b, 3 * mem).line.slope, 1), round(crossed(a, a, 3 * mem).line.slope, 1)
    (3.0, 1.5)
    """
    finite = np.logical_and.reduce([np.isfinite(v) for v in (first, second, values)])
    number = np.floor(first[finite] / WIDTH + ROUNDING)
    _, place = np.unique(number, return_inverse=True)
    counts = np.bincount(place)
    large = counts >= SMALLEST_BIN
    x, mean = (
        np.bincount(place, weights=v[finite], minlength=len(counts))[large] / counts[large]
        for v in (second, values)
    )
    return Crossed(memorization=x, mean=mean, line=line(x, mean, counts[large].astype(np.float64)))


def paper_bins(
    measure: str, memorization: Floats, values: Floats, halves: Crossed | None = None
) -> PaperBins:
    """Bins of width 0.02 over memorization in [0, 1], and their lines.

    >>> mem = np.repeat(np.linspace(0.01, 0.99, 50), 30)
    >>> bins = paper_bins("curvature_out", mem, 3 * mem + 1)
    >>> len(bins.mean), round(bins.straight.slope, 6), round(bins.straight.r_squared, 6)
    (50, 3.0, 1.0)
    """
    finite = np.isfinite(memorization) & np.isfinite(values) & (memorization >= 0)
    mem, y = memorization[finite], values[finite]
    number = np.minimum(np.floor(mem / WIDTH + ROUNDING), round(1 / WIDTH) - 1).astype(np.int64)
    found, place = np.unique(number, return_inverse=True)
    counts = np.bincount(place, minlength=len(found))
    x, mean = (np.bincount(place, weights=v, minlength=len(found)) / counts for v in (mem, y))
    large = counts >= SMALLEST_BIN
    ones = np.ones(len(found))
    return PaperBins(
        measure=measure,
        low=np.asarray(found * WIDTH, np.float64),
        examples=counts,
        memorization=x,
        mean=mean,
        straight=line(x, mean, ones),
        equation_15=line(x / np.sqrt(counts), mean, ones),
        imagenet_notebook=line(x * np.sqrt(counts), mean, ones),
        cifar100_notebook=_plane(x * np.sqrt(counts), counts.astype(np.float64), mean),
        weighted=line(x[large], mean[large], counts[large].astype(np.float64)),
        crossed=halves,
    )


def line(x: Floats, y: Floats, weights: Floats) -> Line | None:
    """The line with a slope of 0 or more that fits best; None with fewer than three points."""
    if len(x) < 3:
        return None
    (slope,), intercept, r_squared = _rising(x[:, None], y, weights)
    return Line(slope=slope, intercept=intercept, r_squared=r_squared)


def _plane(x: Floats, n: Floats, y: Floats) -> Plane | None:
    if len(x) < 4:
        return None
    (slope, per_example), intercept, r_squared = _rising(np.stack([x, n], 1), y, np.ones(len(x)))
    return Plane(slope=slope, per_example=per_example, intercept=intercept, r_squared=r_squared)


def _rising(x: Floats, y: Floats, weights: Floats) -> tuple[list[float], float, float]:
    """Least squares of y [n] on the columns of x [n, k] with coefficients of 0 or more and a free
    intercept: coefficients, intercept, R^2."""
    root = np.sqrt(weights / weights.sum())
    # The intercept is free: its two signs are two columns.
    scale = np.maximum(np.abs(x).max(0), 1e-300)
    one = np.ones((len(x), 1))
    design = np.concatenate([x / scale, one, -one], 1) * root[:, None]
    (*slopes, up, down), residual = optimize.nnls(design, y * root)
    spread = float(((root**2) * (y - (root**2) @ y) ** 2).sum())
    r_squared = 1 - float(residual) ** 2 / spread if spread > 0 else float("nan")
    return [float(v) for v in np.array(slopes) / scale], float(up - down), r_squared
