"""Memorization at two subset ratios, extrapolated to leaving one out.

In:  two scored stores of the same examples and recipe with different subset ratios.
Out: `Extrapolated`: memorization of each example at r = 1 - 1/N with its standard error; bias and
     rank correlation of each of the two ratios.

Shapes: N training examples, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from raymem.encoding import JsonObject
from raymem.errors import StoreError
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.correlation import Coefficient
from raymem.links.cross_store import joined
from raymem.links.folds import Folds
from raymem.links.removal import Mean
from raymem.links.split_half import pearson
from raymem.links.verdicts import Verdict
from raymem.scores import correlation_interval
from raymem.store import Store

MEMORIZED = 0.25
SPLITS = 20
REPLICATES = 200
MODEL = (
    "memorization is linear in the subset ratio: exact where an example is covered by at most one "
    "other, the first order in 1 - r elsewhere"
)


@dataclass(frozen=True, kw_only=True)
class AtRatio:
    """Memorization at one ratio against the extrapolated."""

    ratio: float
    mean: float
    """Over all examples."""
    bias: Mean
    """Minus the extrapolated, over all examples, with its 95% interval over trials."""
    bias_memorized: Mean
    """The same over `memorized` examples."""
    spearman: Coefficient
    """Rank correlation with the extrapolated of other trials, so that no noise is shared."""


@dataclass(frozen=True, kw_only=True)
class Extrapolated(JsonObject):
    """Memorization at r = 1 - 1/N by a line through two ratios."""

    urls: tuple[str, str]
    """The stores of the smaller and the larger ratio."""
    target: float
    """1 - 1/N."""
    examples: pa.Table
    """A row for each training example: at both ratios and extrapolated, with standard errors."""
    mean: float
    """Extrapolated, over all examples."""
    memorized: int
    """Examples above 0.25 by half of the first store's trials, which count nowhere else here."""
    ratios: tuple[AtRatio, AtRatio]
    agreement: float
    """Rank correlation of extrapolated memorization by two halves of the trials."""

    @property
    def verdict(self) -> Verdict:
        """By how much the smaller ratio is above leaving one out."""
        small = self.ratios[0]
        return Verdict(
            text=f"extrapolation: memorization at subset ratio {small.ratio:g} is above its "
            f"extrapolation to leaving one out by {_interval(small.bias)} over all examples and "
            f"by {_interval(small.bias_memorized)} over {self.memorized:,} with memorization "
            f"above {MEMORIZED:g}; their rank correlation is "
            f"{small.spearman.format(2) or 'unknown'}, where halves of the extrapolation agree to "
            f"{self.agreement:.2f}",
            estimate=small.bias.value,
            low=small.bias.low,
            high=small.bias.high,
            not_shown=f"that {MODEL}; a leave-one-out experiment tests it",
        )

    def json_fields(self) -> Mapping[str, object]:
        """All but the examples."""
        return {
            "stores": self.urls,
            "model": MODEL,
            "ratio": self.target,
            "mean": self.mean,
            "agreement": self.agreement,
            "memorized": self.memorized,
            "ratios": self.ratios,
            "verdict": self.verdict,
        }


def weights(first: float, second: float, target: float) -> tuple[float, float]:
    """What values at two ratios count in the line's value at a third.

    >>> [round(w, 6) for w in weights(0.7, 0.9, 1.0)]
    [-0.5, 1.5]
    """
    on_second = (target - first) / (second - first)
    return 1 - on_second, on_second


def extrapolate(first: Store, second: Store, *, seed: int = 0) -> Extrapolated:
    """Extrapolate memorization at epsilon inf to r = 1 - 1/N, from two stores.

    The model: mem_r(i) is linear in r. Where another example covers for i whenever it is in the
    subset, i is right without itself with probability a + b r, so that a line is exact; where
    several cover for it the polynomial has a higher degree, and the line through two ratios is its
    first order around r = 1. With w = (1 - 1/N - r1) / (r2 - r1):

        mem(i) = (1 - w) mem_r1(i) + w mem_r2(i),    SE^2 = (1 - w)^2 SE_r1^2 + w^2 SE_r2^2

    The 95% interval combines those of the two ratios (MOVER, Zou & Donner 2008), since a standard
    error is 0 where all trials agree. A recipe has epochs, not steps: larger subsets take more
    steps, at both ratios and in the limit.

    Raises StoreError if the stores are not of the same examples and recipe at two ratios, with two
    blocks of trials each.
    """
    if first.plan().subset_ratio > second.plan().subset_ratio:
        first, second = second, first
    stores = (first, second)
    ratios = _checked(first, second)
    places = joined(first, second)
    N = len(places)
    rows = (np.arange(N), places)
    w = weights(*ratios, 1 - 1 / N)
    tables = [
        train_at(store.scores(), math.inf).take(pa.array(row))
        for store, row in zip(stores, rows, strict=True)
    ]
    sums = [Folds(train_at(store.scores("folds"), math.inf), []) for store in stores]
    if min(s.n_folds for s in sums) < 2:
        raise StoreError(
            f"{first.url} and {second.url} need two blocks of trials each, to know how far means "
            "are by chance; train more trials"
        )
    examples = _table(tables, ratios, w)
    values = floats(examples, "extrapolated")
    folds = [_by_fold(s, row) for s, row in zip(sums, rows, strict=True)]
    chosen = sums[0].memorization(_every_second(sums[0].n_folds, 0), rows[0]) > MEMORIZED
    rest = [np.flatnonzero(_every_second(sums[0].n_folds, 1)), np.arange(sums[1].n_folds)]
    over_memorized = [f[np.ix_(keep, chosen)] for f, keep in zip(folds, rest, strict=True)]
    spearman, agreement = _ranks(sums, rows, w, np.random.default_rng(seed))
    return Extrapolated(
        urls=(first.url, second.url),
        target=1 - 1 / N,
        examples=examples,
        mean=float(np.nanmean(values)),
        memorized=int(chosen.sum()),
        ratios=tuple(  # type: ignore[arg-type]
            AtRatio(
                ratio=ratios[k],
                mean=float(np.nanmean(floats(tables[k], "memorization"))),
                bias=_bias(folds, w, k),
                bias_memorized=_bias(over_memorized, w, k),
                spearman=spearman[k],
            )
            for k in (0, 1)
        ),
        agreement=agreement,
    )


def _checked(first: Store, second: Store) -> tuple[float, float]:
    """The two ratios, rising."""
    for store in (first, second):
        plan = store.plan()
        if plan.kind not in ("balanced", "fixed-size") or plan.subset_ratio == 1:
            raise StoreError(
                f"{store.url} has {plan}, and extrapolation is of memorization by random subsets; "
                "take two studies with different --subset-ratio"
            )
        if not store.scored(math.inf):
            raise StoreError(
                f"{store.url} has no scored trials at epsilon inf; run its job's `score` stage"
            )
    ratios = (first.plan().subset_ratio, second.plan().subset_ratio)
    if ratios[0] == ratios[1]:
        raise StoreError(
            f"{first.url} and {second.url} both have subset ratio {ratios[0]:g}; train another "
            "with, for example, --subset-ratio 0.9"
        )
    ours, theirs = (store.study().recipe for store in (first, second))
    differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if differing:
        raise StoreError(
            f"{first.url} and {second.url} have other recipes ({', '.join(differing)}); take two "
            "studies that differ in --subset-ratio only"
        )
    return ratios


def _table(tables: Sequence[pa.Table], ratios: Sequence[float], w: Sequence[float]) -> pa.Table:
    columns: dict[str, object] = {
        "example_id": tables[0]["example_id"],
        "label": tables[0]["label"],
    }
    for ratio, table in zip(ratios, tables, strict=True):
        columns[f"memorization_{ratio:g}"] = table["memorization"]
        columns[f"memorization_{ratio:g}_stderr"] = table["memorization_stderr"]
    value, stderr, low, high = (
        [floats(table, f"memorization{name}") for table in tables]
        for name in ("", "_stderr", "_low", "_high")
    )
    # The weight of the smaller ratio is negative: its upper end makes the lower one here.
    below = np.hypot(w[0] * (high[0] - value[0]), w[1] * (value[1] - low[1]))
    above = np.hypot(w[0] * (value[0] - low[0]), w[1] * (high[1] - value[1]))
    extrapolated = w[0] * value[0] + w[1] * value[1]
    columns |= {
        "extrapolated": extrapolated,
        "extrapolated_stderr": np.hypot(w[0] * stderr[0], w[1] * stderr[1]),
        "extrapolated_low": extrapolated - below,
        "extrapolated_high": extrapolated + above,
    }
    return pa.table(columns)


def _every_second(n: int, first: int) -> Floats:
    every: Floats = (np.arange(n) % 2 == first).astype(np.float64)
    return every


def _by_fold(sums: Folds, rows: NDArray[np.int64]) -> Floats:
    """Memorization by each fold alone: [F, N]."""
    return np.stack([sums.memorization(fold, rows) for fold in np.eye(sums.n_folds)])


def _bias(folds: Sequence[Floats], w: Sequence[float], k: int) -> Mean:
    """Mean memorization at ratio k minus the extrapolated; folds are [F, n] of each store."""
    means = [np.nanmean(f, axis=1) if f.size else np.zeros(0) for f in folds]
    if min(map(len, means)) == 0:
        return Mean(value=math.nan, low=math.nan, high=math.nan)
    signs = [(j == k) - w[j] for j in (0, 1)]
    value = float(sum(s * m.mean() for s, m in zip(signs, means, strict=True)))
    if min(map(len, means)) < 2:
        return Mean(value=value, low=math.nan, high=math.nan)
    variances = [s**2 * m.var(ddof=1) / len(m) for s, m in zip(signs, means, strict=True)]
    total = float(sum(variances))
    freedoms = sum(v**2 / (len(m) - 1) for v, m in zip(variances, means, strict=True))
    half = float(stats.t.ppf(0.975, total**2 / freedoms)) * math.sqrt(total) if total else 0.0
    return Mean(value=value, low=value - half, high=value + half)


def _ranks(
    sums: Sequence[Folds],
    rows: Sequence[NDArray[np.int64]],
    w: Sequence[float],
    generator: np.random.Generator,
) -> tuple[list[Coefficient], float]:
    """Spearman of each ratio with the extrapolated of the other half of the trials, and of the
    extrapolated of two halves; means over splits, intervals by a bootstrap over examples."""

    def one_split() -> list[list[Floats]]:
        """Of each half: both ratios and the extrapolated, [N] each."""
        halves: list[list[Floats]] = [[], []]
        for s, row in zip(sums, rows, strict=True):
            first = s.half(generator)
            for half, weight in zip(halves, (first, 1 - first), strict=True):
                half.append(s.memorization(weight, row))
        return [[*half, w[0] * half[0] + w[1] * half[1]] for half in halves]

    def correlations(split: list[list[Floats]], chosen: NDArray[np.int64]) -> list[float]:
        ranked = [[stats.rankdata(values[chosen]) for values in half] for half in split]
        (a, b) = ranked
        return [(pearson(a[k], b[2]) + pearson(b[k], a[2])) / 2 for k in range(3)]

    N = len(rows[0])
    splits = [one_split() for _ in range(SPLITS)]
    known = np.flatnonzero(
        np.logical_and.reduce([np.isfinite(v) for split in splits for half in split for v in half])
    )
    if len(known) < 3:
        unknown = Coefficient(value=math.nan, low=math.nan, high=math.nan)
        return [unknown, unknown], math.nan
    values = np.mean([correlations(split, known) for split in splits], axis=0)
    replicates = [
        correlations(splits[k % SPLITS], generator.choice(known, len(known)))
        for k in range(REPLICATES if N < 100_000 else SPLITS)
    ]
    columns = list(zip(*replicates, strict=True))
    found = []
    for k in (0, 1):
        low, high = correlation_interval(float(values[k]), columns[k])
        found.append(Coefficient(value=float(values[k]), low=low, high=high))
    return found, float(values[2])


def _interval(mean: Mean) -> str:
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
