"""Correlation of memorization with curvature, and with the cheaper measures it is compared to.

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
from numpy.typing import NDArray
from scipy import special, stats

from raymem.links.binned import Crossed, PaperBins, crossed, line, paper_bins
from raymem.links.column_arrays import ROUNDING, Floats, floats, train_at
from raymem.links.equal_loss import EqualLoss, at_equal_loss
from raymem.links.folds import Folds
from raymem.links.split_half import in_halves
from raymem.scores import correlation_interval, most_tied, spearman_ceiling
from raymem.store import Store
from raymem.store.measures import MEASURES, OTHER, known_measures

# Memorization above it is what the AUC looks for: the threshold of Feldman & Zhang's lists.
MEMORIZED = 0.25
PERMUTATIONS = 200
REPLICATES = 300
# Of more examples, so many drawn ones: more only cost time.
MOST_EXAMPLES = 100_000
CONFIDENCE = 0.95
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A correlation and its 95% interval."""

    value: float
    low: float
    high: float

    def format(self, digits: int) -> str:
        """As text; empty if it is not known.

        >>> Coefficient(value=0.557, low=0.516, high=0.595).format(2)
        '0.56 [0.52, 0.59]'
        """
        if math.isnan(self.value):
            return ""
        if math.isnan(self.low):
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Memorization against one measure, over training examples."""

    measure: str
    """Column of scores/examples.parquet, or p_wrong: 1 - p_true, or wrong_out: 1 - accuracy_out,
    which is memorization itself wherever models fit what they train on."""
    spearman: Coefficient
    """Of ranks. Its interval, like those below, is around what this many trials give on average:
    noise in memorization and in the measure attenuates that, and the interval does not cover the
    correlation without noise."""
    ceiling: float
    """The largest Spearman correlation that these values can have in any pairing; ties in
    memorization keep it below 1 (see `raymem.scores.spearman_ceiling`)."""
    tied: float
    """Share of the examples that have the most frequent value of memorization."""
    tied_at: float
    """That value, mostly 0."""
    among_memorized: Coefficient
    """Spearman's among examples with memorization above 0."""
    auc: Coefficient
    """Probability that the measure ranks an example with memorization above 0.25 over one without;
    NaN if there are not both."""
    pearson: Coefficient
    """Of values."""
    pearson_disattenuated: float
    """Pearson's between memorization of one half of the folds and the measure of the other, over
    the square root of what the halves agree with themselves: an estimate of the correlation without
    noise, also without noise that both share. NaN with one fold."""
    cosine: Coefficient
    """Of the two as vectors (Garg et al. 2024); unrelated positive ones have a high one too."""
    cosine_null: float
    """Its mean when the measure is shuffled among examples."""
    at_equal_loss: EqualLoss | None
    """Rank correlations at equal loss, by several methods, as a description; None for measures
    other than curvature, and without the loss of out-models."""
    reliability: float
    """Split-half reliability of the measure; NaN with one fold."""
    slope: float
    """L of measure = L memorization + k, by least squares over examples; not negative."""
    slope_low: float
    """Its 95% interval by the same bootstrap. Noise in memorization flattens the slope, and the
    interval is around the flattened one."""
    slope_high: float
    intercept: float
    """k."""
    slope_instrumented: float
    """The same slope by split-half instruments: noise does not flatten it."""
    c1: float
    """The least c1 for which memorization <= measure / L + c1 for every example. One example
    decides it: it rises with their number, and has no interval."""
    violating: float
    """Share of the examples above the fitted line, for which it is no bound."""
    examples: int
    """Training examples that have both. Those that no trial learned have no learning epoch."""
    folds: int
    """Folds of trials that have the measure. With one the interval knows nothing of how the measure
    varies over trials."""


def correlations(store: Store, *, seed: int = 0) -> dict[float, list[Correlation]]:
    """Memorization against each measure of MEASURES that the scores have, by epsilon.

    Intervals are a two-way bootstrap, over folds of whole blocks of trials and over examples, with
    the bootstrap's standard deviation of Fisher's z around the estimate: resampled folds are
    noisier than the trials are, which biases the replicates towards 0, not their spread.

    Empty for published scores, which have no trials. Raises StoreError without scores.
    """
    scores = store.scores()
    found = {}
    for epsilon in sorted(set(scores["epsilon"].to_pylist())):
        here = train_at(scores, epsilon)
        mem, values = floats(here, "memorization"), known_measures(here)
        if np.isfinite(mem).any() and store.scored(epsilon):
            sums = Folds(train_at(store.scores("folds"), epsilon), list(values))
            found[epsilon] = correlate(mem, values, sums, np.random.default_rng(seed))
    return found


def has_curvature(rows: Sequence[Correlation]) -> bool:
    """Is any of the measures curvature? Without, rows are only what every fleet gives."""
    return any(row.measure in MEASURES and not MEASURES[row.measure].rival for row in rows)


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
        here = train_at(scores, epsilon)
        mem = floats(here, "memorization")
        if not np.isfinite(floats(here, "curvature_out")).any():
            continue
        number = np.clip(np.floor(np.nan_to_num(mem) * BINS + ROUNDING), -BINS, BINS - 1)
        rows = []
        for b in np.unique(number[np.isfinite(mem)]):
            inside = np.isfinite(mem) & (number == b)
            row = {"from": b / BINS, "to": (b + 1) / BINS, "examples": int(inside.sum())}
            for name, column in known_measures(here).items():
                values = column[inside]
                finite = values[np.isfinite(values)]
                row[name] = float(finite.mean()) if len(finite) else None
            rows.append(row)
        found[epsilon] = pa.Table.from_pylist(rows)
    return found


def in_paper_bins(
    store: Store, epsilons: Sequence[float], *, seed: int = 0
) -> dict[float, list[PaperBins]]:
    """The paper's figure of each measure of curvature, by epsilon; see `paper_bins`."""
    scores = store.scores()
    found = {}
    for epsilon in epsilons:
        here = train_at(scores, epsilon)
        mem = floats(here, "memorization")
        measures = {n: v for n, v in known_measures(here).items() if not MEASURES[n].rival}
        sums = Folds(train_at(store.scores("folds"), epsilon), list(measures))
        first = sums.half(np.random.default_rng(seed)) if sums.can_be_halved else None
        found[epsilon] = [
            paper_bins(name, mem, values, None if first is None else _crossed(sums, name, first))
            for name, values in measures.items()
        ]
    return found


def _crossed(sums: Folds, name: str, first: Floats) -> Crossed:
    rows = np.arange(sums.n_examples)
    second = 1 - first
    return crossed(
        sums.memorization(first, rows),
        sums.memorization(second, rows),
        sums.mean(name, second, rows),
    )


def correlate(
    mem: Floats,
    values: dict[str, Floats],
    sums: Folds,
    generator: np.random.Generator,
    replicates: int = REPLICATES,
) -> list[Correlation]:
    """Memorization [N] against each of `values` [N]; `sums` say how both vary over folds."""
    if len(mem) > MOST_EXAMPLES:
        chosen = np.sort(generator.choice(len(mem), MOST_EXAMPLES, replace=False))
    else:
        chosen = np.arange(len(mem))
    mem, values = mem[chosen], {name: column[chosen] for name, column in values.items()}
    names = [name for name in (*MEASURES, OTHER.name) if name in values]
    estimates = _all_kinds(mem, values)
    resamples: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    slopes: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(replicates):
        weights = sums.resampled(generator)
        rows = chosen[generator.integers(len(mem), size=len(mem))]
        resampled = {name: sums.mean(name, weights, rows) for name in names}
        mem_resampled = sums.memorization(weights, rows)
        for name, row in _all_kinds(mem_resampled, resampled).items():
            resamples[name].append(row)
            slopes[name].append(_slope(mem_resampled, resampled[name]))
    halves = in_halves(sums, names, chosen, generator)
    found = []
    for name in names:
        both = np.isfinite(mem) & np.isfinite(values[name])
        drawn_kinds = [[row[kind] for row in resamples[name]] for kind in range(5)]
        spearman, pearson, cosine, among = (
            _interval(value, drawn)
            for value, drawn in zip(estimates[name][:4], drawn_kinds[:4], strict=True)
        )
        above = int((mem[both] > MEMORIZED + ROUNDING).sum())
        auc = _auc(estimates[name][4], drawn_kinds[4], above * (int(both.sum()) - above))
        tied_at, tied = most_tied(mem[both])
        fitted = _bound(mem[both], values[name][both])
        drawn = np.array(slopes[name])[np.isfinite(slopes[name])]
        half = Z * float(drawn.std(ddof=1)) if len(drawn) > 1 else math.nan
        found.append(
            Correlation(
                measure=name,
                spearman=spearman,
                ceiling=spearman_ceiling(mem[both], values[name][both]),
                tied=tied,
                tied_at=tied_at,
                among_memorized=among,
                auc=auc,
                pearson=pearson,
                pearson_disattenuated=halves[name].pearson,
                cosine=cosine,
                cosine_null=_shuffled_cosine(mem[both], values[name][both], generator),
                at_equal_loss=at_equal_loss(name, mem, values, halves[name]),
                reliability=halves[name].reliability,
                slope_low=max(0.0, fitted["slope"] - half),
                slope_high=fitted["slope"] + half,
                slope_instrumented=halves[name].slope,
                examples=int(both.sum()),
                folds=sums.folds_of(name),
                **fitted,
            )
        )
    return found


def _all_kinds(mem: Floats, values: dict[str, Floats]) -> dict[str, tuple[float, ...]]:
    """Spearman, Pearson, cosine, Spearman among examples with memorization above 0, and Somers' D
    for memorization above 0.25 (2 AUC - 1): of each measure over the examples that have it and
    memorization.

    A measure that no example has (no fold with it was drawn) is NaN.
    """
    known = np.isfinite(mem)
    alike: dict[bytes, list[str]] = {}
    for name, column in values.items():
        alike.setdefault(np.packbits(known & np.isfinite(column)).tobytes(), []).append(name)
    found: dict[str, tuple[float, ...]] = {}
    for names in alike.values():
        has = known & np.isfinite(values[names[0]])
        rows = _kinds(mem[has], np.stack([values[name][has] for name in names]))
        found.update(zip(names, rows, strict=True))
    return {name: found[name] for name in values}


def _kinds(mem: Floats, x: Floats) -> list[tuple[float, ...]]:
    """Of each row of x [m, n], all ranked at once: with few examples, each call costs the most."""
    if len(mem) < 3 or np.ptp(mem) == 0:
        return [(math.nan,) * 5] * len(x)
    ranks = stats.rankdata(x, axis=1)
    size = np.maximum(np.linalg.norm(mem) * np.linalg.norm(x, axis=1), 1e-300)
    columns = (
        _pearsons(stats.rankdata(mem), ranks),
        _pearsons(mem, x),
        x @ mem / size,
        _among(mem > ROUNDING, mem, x),
        _somers(mem > MEMORIZED + ROUNDING, ranks),
    )
    return [tuple(row) for row in np.stack(columns, 1).tolist()]


def _pearsons(a: Floats, x: Floats) -> Floats:
    """Pearson's correlation of a [n] with each row of x [m, n]; NaN where one does not vary."""
    a, x = a - a.mean(), x - x.mean(1, keepdims=True)
    size = np.linalg.norm(a) * np.linalg.norm(x, axis=1)
    found: Floats = np.divide(x @ a, size, out=np.full(len(x), np.nan), where=size > 0)
    return found


def _among(chosen: NDArray[np.bool_], y: Floats, x: Floats) -> Floats:
    """Spearman's correlation of y [n] and each row of x [m, n] among the chosen ones."""
    if chosen.sum() < 3:
        return np.full(len(x), np.nan)
    return _pearsons(stats.rankdata(y[chosen]), stats.rankdata(x[:, chosen], axis=1))


def _somers(above: NDArray[np.bool_], ranks: Floats) -> Floats:
    """2 AUC - 1 from midranks [m, n]: the Mann-Whitney statistic, ties counting half."""
    n, m = int(above.sum()), int((~above).sum())
    if n == 0 or m == 0:
        return np.full(len(ranks), np.nan)
    auc: Floats = (ranks[:, above].sum(1) / n - (n + 1) / 2) / m
    return 2 * auc - 1


def _auc(somers: float, replicates: Sequence[float], pairs: int) -> Coefficient:
    """An AUC from Somers' D and its bootstrap replicates: the interval of its logit by the delta
    method (Pepe 2003, section 5.2). Replicates of exactly 1 have no finite logit themselves.
    """
    drawn = np.array(replicates)
    drawn = (1 + drawn[np.isfinite(drawn)]) / 2
    value = (1 + somers) / 2
    if math.isnan(value) or len(drawn) < 2:
        return Coefficient(value=value, low=math.nan, high=math.nan)
    # Of so many pairs one in the wrong order is the least that can be seen.
    inside = min(max(value, 1 / (1 + pairs)), 1 - 1 / (1 + pairs))
    half = Z * float(drawn.std(ddof=1)) / (inside * (1 - inside))
    low, high = special.expit(special.logit(inside) + np.array([-half, half]))
    return Coefficient(value=value, low=min(float(low), value), high=max(float(high), value))


def _shuffled_cosine(mem: Floats, x: Floats, generator: np.random.Generator) -> float:
    if len(mem) == 0:
        return math.nan
    size = max(float(np.linalg.norm(mem) * np.linalg.norm(x)), 1e-300)
    return float(np.mean([mem @ generator.permutation(x) for _ in range(PERMUTATIONS)]) / size)


def _bound(mem: Floats, x: Floats) -> dict[str, float]:
    """The line x = slope mem + intercept, and how far it is from being a bound."""
    fitted = line(mem, x, np.ones(len(mem)))
    if fitted is None:
        return dict.fromkeys(("slope", "intercept", "c1", "violating"), math.nan)
    c1 = float((mem - x / fitted.slope).max()) if fitted.slope > 0 else math.nan
    above = x < fitted.slope * mem + fitted.intercept
    return {
        "slope": fitted.slope,
        "intercept": fitted.intercept,
        "c1": c1,
        "violating": float(above.mean()),
    }


def _slope(mem: Floats, x: Floats) -> float:
    """Of x on mem, by least squares; may be negative."""
    both = np.isfinite(mem) & np.isfinite(x)
    if both.sum() < 3 or np.ptp(mem[both]) == 0:
        return math.nan
    centred = mem[both] - mem[both].mean()
    return float(centred @ x[both] / (centred @ centred))


def _interval(value: float, replicates: Sequence[float]) -> Coefficient:
    low, high = correlation_interval(value, replicates)
    return Coefficient(value=value, low=low, high=high)
