"""Link 2: mean curvature against epsilon (Ravikumar et al. 2024, Theorem 5.3 and section 6.4).

In:  scores/trials.parquet of a study with several epsilons: each trial's mean loss and curvature.
Out: L(eps) = a + b e^{-c eps} fitted to the losses, eq. 16 to the curvature, with a bootstrap over
     trials through both stages, and rivals with their cross-validated error.

Shapes: E epsilons, T trials (subset numbers) that all epsilons have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from raymem.links.fits import (
    CONDITION,
    RATES,
    Fit,
    Predictor,
    Shape,
    compared,
    condition,
    fit_curvature,
    fit_loss,
    fit_rivals,
)
from raymem.links.rows import Floats
from raymem.store import Store

REPLICATES = 500
CONFIDENCE = 0.95
# With fewer trials at each epsilon bootstrap intervals are too narrow (c was covered 80% with 10).
TRIALS_FOR_INTERVALS = 20
EPSILONS_FOR_FITS = 4


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the trials at one epsilon show; means over the training examples, in subset or not."""

    epsilon: float
    trials: int
    loss: float
    """Nats."""
    loss_stderr: float
    """Over trials; NaN with fewer than two."""
    curvature: float | None
    """Of the summed loss, nats per squared pixel unit; None: not measured."""
    curvature_stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Link2:
    """Mean curvature against epsilon."""

    observed: list[Observed]
    curvature_modes: list[str]
    """How traces were computed; more than one are not to be compared."""
    shape: Shape | None = None
    """L(eps)."""
    slope: float = math.nan
    """Where the theorem has m + 1."""
    c2: float = math.nan
    intervals: dict[str, tuple[float, float]]
    """95%: t of the bootstrap's standard error over trials, of a, b, c, slope, c2."""
    fits: list[Fit]
    """The theorem's law and its rivals over finite epsilons, best cross-validated error first."""
    rises: float = math.nan
    """Spearman correlation of mean curvature with epsilon."""
    warnings: list[str]
    """Why not to believe it."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "measured_on": "training examples, in the subset or not",
            "observed": [plain(vars(o)) for o in self.observed],
            "curvature_modes": self.curvature_modes,
            "loss_fit": None if self.shape is None else plain(vars(self.shape)),
            "slope_in_place_of_m_plus_1": number(self.slope),
            "c2": number(self.c2),
            "intervals_95": {k: [number(v) for v in pair] for k, pair in self.intervals.items()},
            "laws": [
                plain({**vars(fit), "parameters": plain(fit.parameters)}) for fit in self.fits
            ],
            "spearman_of_curvature_with_epsilon": number(self.rises),
            "warnings": self.warnings,
        }


def link2(store: Store, *, seed: int = 0) -> Link2:
    """Link 2 of a store with several epsilons. Raises StoreError without scores."""
    rows = [row for row in store.scores("trials").to_pylist() if row["status"] == "done"]
    N = store.plan().n
    epsilons = sorted({row["epsilon"] for row in rows})
    modes = sorted({row["curvature_mode"] for row in rows if row["curvature_mode"]})

    def matrix(name: str) -> tuple[list[int], Floats]:
        """[E, T] of the trials that all epsilons have with that column."""
        value = {(r["epsilon"], r["trial"]): _over_all(r, name, N) for r in rows}
        value = {key: v for key, v in value.items() if v is not None}
        trials = (
            sorted(
                {t for _, t in value}
                & set.intersection(*({t for e, t in value if e == eps} for eps in epsilons))
            )
            if epsilons
            else []
        )
        return trials, np.array([[value[e, t] for t in trials] for e in epsilons], np.float64)

    trials, losses = matrix("loss")
    measured, curvature = matrix("curvature")
    if measured:
        # The same trials in both, so that a replicate draws both together.
        losses = losses[:, [trials.index(t) for t in measured]]
    return fit_link2(
        np.array(epsilons), losses, curvature if measured else None, modes=modes, seed=seed
    )


def _over_all(row: dict[str, Any], name: str, N: int) -> float | None:
    """A trial's mean over all N training examples, from those over its subset and the rest."""
    inside, outside, n = row[f"{name}_in"], row[f"{name}_out"], row["subset_size"]
    if inside is None or (outside is None and n < N):
        return None
    return float((inside * n + (outside or 0.0) * (N - n)) / N)


def fit_link2(
    epsilons: Floats,
    losses: Floats,
    curvature: Floats | None,
    *,
    modes: list[str] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Link2:
    """Link 2 from each trial's mean loss and curvature, [E, T]; rows are `epsilons`, rising.

    Trials of one number share their subset at all epsilons, and are drawn together.
    """
    T = losses.shape[1] if losses.size else 0
    observed = [
        Observed(
            epsilon=float(epsilon),
            trials=T,
            loss=float(losses[k].mean()) if T else math.nan,
            loss_stderr=_stderr(losses[k]) if T else math.nan,
            curvature=None if curvature is None else float(curvature[k].mean()),
            curvature_stderr=None if curvature is None else _stderr(curvature[k]),
        )
        for k, epsilon in enumerate(epsilons)
    ]
    base: dict[str, Any] = {"observed": observed, "curvature_modes": modes or []}
    finite = np.isfinite(epsilons)
    if curvature is None or T == 0:
        why = "curvature was not measured" if T else "no trial is done at all epsilons"
        return Link2(**base, intervals={}, fits=[], warnings=[why])
    if finite.sum() < EPSILONS_FOR_FITS:
        why = (
            f"{finite.sum()} finite epsilons: too few to fit a law, {EPSILONS_FOR_FITS} are needed"
        )
        return Link2(
            **base, intervals={}, fits=[], warnings=[why], rises=_spearman(curvature.mean(1))
        )
    weights = _weights(losses)
    shape, z, slope, c2 = _two_stages(epsilons, losses.mean(1), curvature.mean(1), weights)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(replicates if T > 1 else 0):
        trials = generator.integers(T, size=T)
        s, _, k, c = _two_stages(
            epsilons, losses[:, trials].mean(1), curvature[:, trials].mean(1), weights
        )
        drawn.append((s.a, s.b, s.c, k, c))
    estimate = (shape.a, shape.b, shape.c, slope, c2)
    intervals = {
        name: _interval(value, column, T)
        for name, value, column in zip(
            ("a", "b", "c", "slope", "c2"), estimate, np.array(drawn).T, strict=False
        )
    }

    def theorem(e: Floats, y: Floats) -> tuple[Predictor, dict[str, float]]:
        # L(eps) is its first stage, and comes from the losses of the same epsilons.
        rows = np.searchsorted(epsilons, e)
        law, _, m, k = _two_stages(e, losses.mean(1)[rows], y, weights[rows])
        return lambda at: m * law(at) * -np.expm1(-at) + k, {"slope": m, "c2": k, **vars(law)}

    means = curvature.mean(1)[finite]
    fits = [compared("theorem", theorem, epsilons[finite], means)]
    fits = sorted([*fits, *fit_rivals(epsilons[finite], means)], key=lambda fit: fit.loo_rmse)
    return Link2(
        **base,
        shape=shape,
        slope=slope,
        c2=c2,
        intervals=intervals,
        fits=fits,
        rises=_spearman(curvature.mean(1)),
        warnings=_doubts(shape, z, slope, c2, intervals, T, modes or [], fits),
    )


def _interval(value: float, replicates: Floats, T: int) -> tuple[float, float]:
    """Percentiles of the bootstrap cover too little with twenty trials; these come near 95%."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < 2 or math.isnan(value):
        return math.nan, math.nan
    stderr = float(finite.std(ddof=1)) * math.sqrt(T / (T - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, T - 1)) * stderr
    return max(0.0, value - half), value + half


def _two_stages(
    epsilons: Floats, losses: Floats, curvature: Floats, weights: Floats
) -> tuple[Shape, Floats, float, float]:
    shape = fit_loss(epsilons, losses, weights)
    z = shape(epsilons) * -np.expm1(-epsilons)
    slope, c2 = fit_curvature(z, curvature)
    return shape, z, slope, c2


def _weights(losses: Floats) -> Floats:
    """1 / variance of each mean; alike where it is not known. [E]"""
    if losses.shape[1] < 2:
        return np.ones(len(losses))
    variance: Floats = losses.var(1, ddof=1)
    # A mean that happens to vary little is not to decide the fit alone.
    return np.asarray(1 / np.maximum(variance, np.median(variance) / 10 + 1e-300))


def _doubts(
    shape: Shape,
    z: Floats,
    slope: float,
    c2: float,
    intervals: dict[str, tuple[float, float]],
    T: int,
    modes: list[str],
    fits: list[Fit],
) -> list[str]:
    doubts = []
    if len(modes) > 1:
        doubts.append(f"curvature was computed in {len(modes)} modes: {', '.join(modes)}")
    if T < TRIALS_FOR_INTERVALS:
        doubts.append(
            f"{T} trials at each epsilon: intervals are too narrow with fewer than "
            f"{TRIALS_FOR_INTERVALS}"
        )
    if shape.b == 0:
        doubts.append("the loss does not fall with epsilon: b is 0, c means nothing")
    elif not RATES[0] * 1.01 < shape.c < RATES[-1] / 1.01:
        doubts.append(f"c is at the edge of what was tried ({shape.c:.3g}): not identified")
    if (parallel := condition(z)) > CONDITION:
        doubts.append(
            "slope and c2 are not identified: their columns are almost parallel (condition number "
            f"{parallel:.2g}); epsilons below 1 would tell them apart"
        )
    for name, value in (("slope", slope), ("c2", c2)):
        low, high = intervals.get(name, (math.nan, math.nan))
        if value > 0 and high - low > 2 * value:
            doubts.append(f"{name} is hardly known: {value:.3g} [{low:.3g}, {high:.3g}]")
        if value == 0:
            doubts.append(f"{name} is at its limit of 0: the best fit would be negative")
    if fits[0].law != "theorem":
        ours = next(fit for fit in fits if fit.law == "theorem")
        doubts.append(
            f"the law {fits[0].law} predicts left-out epsilons better: error "
            f"{fits[0].loo_rmse:.3g}, the theorem's {ours.loo_rmse:.3g}"
        )
    return doubts


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _spearman(means: Floats) -> float:
    """With the order of epsilons."""
    if len(means) < 3:
        return math.nan
    ranks = means.argsort().argsort()
    return float(np.corrcoef(np.arange(len(means)), ranks)[0, 1])


def number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    if value is None or math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same of a dictionary's floats."""
    return {k: number(v) if isinstance(v, float) else v for k, v in values.items()}


def observed_table(link: Link2) -> pa.Table:
    """What was observed, a row for each epsilon."""
    return pa.Table.from_pylist([vars(o) for o in link.observed])
