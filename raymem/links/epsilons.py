"""Link 2: mean curvature against epsilon (Ravikumar et al. 2024, Theorem 5.3 and section 6.4).

In:  scores/trials.parquet of a study with several epsilons: each trial's mean loss and curvature.
Out: L(eps) = a + b e^{-c eps} fitted to the losses, eq. 16 to the curvature, with a bootstrap over
     trials through both stages, and rivals with their cross-validated error.

At finite epsilons gradients are clipped alike and only the noise differs. At epsilon inf there is
no noise, and by default no clipping either: that point is on another curve, and is fitted only if
gradients were clipped there too (`--clip-control`).

Shapes: E epsilons, T trials (subset numbers) that all epsilons have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
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
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
# With more bootstrap samples at a parameter's boundary than this an end of its interval is there.
AT_ZERO = 0.025


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the trials at one epsilon show; means over the training examples."""

    epsilon: float
    trials: int
    loss: float
    """Nats; over examples in the subset or not."""
    loss_stderr: float
    """Over trials; NaN with fewer than two."""
    curvature: float | None
    """Of the summed loss, nats per squared pixel unit, over examples in the subset or not; None:
    not measured."""
    curvature_stderr: float | None
    curvature_in: float | None = None
    """Over the examples that the trial trained on."""
    curvature_in_stderr: float | None = None
    curvature_out: float | None = None
    """Over those that it did not; None where every trial trains on all."""
    curvature_out_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A fitted parameter that may not be negative."""

    value: float
    low: float
    """95%: t of the bootstrap's standard error over trials; NaN at the boundary, where a bootstrap
    says nothing, and with one trial."""
    high: float
    at_boundary: bool
    """Is it 0 because the best fit would be negative?"""

    def shown(self) -> str:
        """As text.

        >>> Parameter(value=0.0, low=math.nan, high=math.nan, at_boundary=True).shown()
        '0 (at the boundary)'
        """
        if self.at_boundary:
            return "0 (at the boundary)"
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between two means with its 95% interval; NaN ends if it is not known."""

    value: float
    low: float
    high: float

    @classmethod
    def between(cls, a: float, a_stderr: float, b: float, b_stderr: float) -> Change:
        """b - a, as if independent: trials that share subsets are correlated, and the interval is
        then too wide."""
        half = Z * math.hypot(a_stderr, b_stderr)
        return cls(value=b - a, low=b - a - half, high=b - a + half)


@dataclass(frozen=True, kw_only=True)
class Link2:
    """Mean curvature against epsilon."""

    observed: list[Observed]
    curvature_modes: list[str]
    """How traces were computed; more than one are not to be compared."""
    clipped_at_inf: bool | None = None
    """Were gradients clipped at epsilon inf? None without epsilon inf."""
    shape: Shape | None = None
    """L(eps)."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    """a, b, c of L(eps); slope, which stands where the theorem has m + 1; c2."""
    slope_by_arm: dict[str, Parameter] = field(default_factory=dict)
    """The slope fitted to the curvature of examples `in` and `out` of the subset alone."""
    fits: list[Fit]
    """The theorem's law, with fitted and with constant L, and its rivals over finite epsilons, best
    cross-validated error first."""
    rises: float = math.nan
    """Spearman correlation of mean curvature with epsilon, over the epsilons that are fitted."""
    clipping: Change | None = None
    """Mean curvature without clipping minus with clipping, both at epsilon inf, without noise; None
    unless both were trained."""
    warnings: list[str]
    """Why not to believe it."""

    @property
    def fitted(self) -> list[Observed]:
        """The epsilons that one curve can go through: all finite ones, inf if clipped."""
        return [o for o in self.observed if math.isfinite(o.epsilon) or self.clipped_at_inf]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "measured_on": "training examples, in the subset or not",
            "observed": [plain(vars(o)) for o in self.observed],
            "curvature_modes": self.curvature_modes,
            "clipped_at_inf": self.clipped_at_inf,
            "fitted_epsilons": [number(o.epsilon) for o in self.fitted],
            "loss_fit": None if self.shape is None else plain(vars(self.shape)),
            "parameters": {k: plain(vars(v)) for k, v in self.parameters.items()},
            "slope_by_arm": {k: plain(vars(v)) for k, v in self.slope_by_arm.items()},
            "laws": [
                plain({**vars(fit), "parameters": plain(fit.parameters)}) for fit in self.fits
            ],
            "spearman_of_curvature_with_epsilon": number(self.rises),
            "clipping": None if self.clipping is None else plain(vars(self.clipping)),
            "warnings": self.warnings,
        }


def link2(store: Store, *, unclipped: Store | None = None, seed: int = 0) -> Link2:
    """Link 2 of a store with several epsilons. Raises StoreError without scores.

    `unclipped` is a study of the same recipe whose epsilon inf was trained without clipping: where
    `store` clipped there, the two tell what clipping alone does.
    """
    rows = _done(store)
    N = store.plan().n
    epsilons = sorted({row["epsilon"] for row in rows})
    modes = sorted({row["curvature_mode"] for row in rows if row["curvature_mode"]})
    trials, losses = _matrix(rows, epsilons, lambda row: _over_all(row, "loss", N))
    measured, curvature = _matrix(rows, epsilons, lambda row: _over_all(row, "curvature", N))
    arms = {}
    if measured:
        # The same trials in both, so that a replicate draws both together.
        losses = losses[:, [trials.index(t) for t in measured]]
        for arm in ("in", "out"):
            known, values = _matrix(rows, epsilons, itemgetter(f"curvature_{arm}"))
            if known == measured:
                arms[arm] = values
    clipped = _clipped(rows)
    reference = None
    if clipped and unclipped is not None and _recipe(store) == _recipe(unclipped):
        reference = _without_clipping(unclipped, modes)
    return fit_link2(
        np.array(epsilons),
        losses,
        curvature if measured else None,
        arms=arms,
        clipped_at_inf=clipped,
        unclipped=reference,
        modes=modes,
        seed=seed,
    )


def _done(store: Store) -> list[dict[str, Any]]:
    return [row for row in store.scores("trials").to_pylist() if row["status"] == "done"]


def _matrix(
    rows: Sequence[dict[str, Any]],
    epsilons: Sequence[float],
    value_of: Callable[[dict[str, Any]], float | None],
) -> tuple[list[int], Floats]:
    """The trials that all epsilons have with a value, and the values [E, T]."""
    value = {(r["epsilon"], r["trial"]): value_of(r) for r in rows}
    value = {key: v for key, v in value.items() if v is not None}
    of_each = [{t for e, t in value if e == epsilon} for epsilon in epsilons]
    trials = sorted(set.intersection(*of_each)) if of_each else []
    return trials, np.array([[value[e, t] for t in trials] for e in epsilons], np.float64)


def _clipped(rows: Sequence[dict[str, Any]]) -> bool | None:
    """Were gradients clipped at epsilon inf? None without such trials."""
    norms = [row.get("max_grad_norm") for row in rows if math.isinf(row["epsilon"])]
    return all(norm is not None and math.isfinite(norm) for norm in norms) if norms else None


def _recipe(store: Store) -> Any:
    return store.study()["study"]["recipe"]


def _without_clipping(store: Store, modes: Sequence[str]) -> Floats | None:
    """Each trial's mean curvature at epsilon inf, [T], trained by the private mechanism's steps
    without clipping and noise; None if there are none, or curvature was computed in other modes."""
    rows = [r for r in _done(store) if math.isinf(r["epsilon"]) and r.get("max_grad_norm")]
    rows = [r for r in rows if math.isinf(r["max_grad_norm"]) and r["curvature_mode"] in modes]
    found = [_over_all(row, "curvature", store.plan().n) for row in rows]
    known = np.array([v for v in found if v is not None], np.float64)
    return known if len(known) else None


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
    arms: Mapping[str, Floats] | None = None,
    clipped_at_inf: bool | None = None,
    unclipped: Floats | None = None,
    modes: list[str] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Link2:
    """Link 2 from each trial's mean loss and curvature, [E, T]; rows are `epsilons`, rising.

    Trials of one number share their subset at all epsilons, and are drawn together. `arms` are the
    curvature of examples `in` and `out` of the subset, [E, T] each. Epsilon inf is fitted only if
    `clipped_at_inf`. `unclipped` [T'] is curvature at epsilon inf without clipping.
    """
    T, arms, modes = losses.shape[1] if losses.size else 0, arms or {}, modes or []
    base: dict[str, Any] = {
        "observed": _observed(epsilons, losses, curvature, arms),
        "curvature_modes": modes,
        "clipped_at_inf": bool(clipped_at_inf) if np.isinf(epsilons).any() else None,
    }
    if curvature is None or T == 0:
        why = "curvature was not measured" if T else "no trial is done at all epsilons"
        return Link2(**base, fits=[], warnings=[why])
    use = np.isfinite(epsilons) | bool(clipped_at_inf)
    base["clipping"] = _clipping(curvature, unclipped) if clipped_at_inf else None
    base["rises"] = _spearman(curvature[use].mean(1))
    finite = int(np.isfinite(epsilons).sum())
    if finite < EPSILONS_FOR_FITS:
        why = f"{finite} finite epsilons: too few to fit a law, {EPSILONS_FOR_FITS} are needed"
        return Link2(**base, fits=[], warnings=[why])
    chosen = epsilons[use], losses[use], curvature[use]
    fitted = _bootstrapped(*chosen, {k: v[use] for k, v in arms.items()}, replicates, seed)
    fits = _laws(*(values[np.isfinite(chosen[0])] for values in chosen))
    return Link2(
        **base,
        shape=fitted.shape,
        parameters=fitted.parameters,
        slope_by_arm=fitted.by_arm,
        fits=fits,
        warnings=_doubts(fitted, T, modes, fits),
    )


def _observed(
    epsilons: Floats, losses: Floats, curvature: Floats | None, arms: Mapping[str, Floats]
) -> list[Observed]:
    T = losses.shape[1] if losses.size else 0
    found = []
    for k, epsilon in enumerate(epsilons):
        measured: dict[str, float | None] = {"curvature": None, "curvature_stderr": None}
        columns = {} if curvature is None else {"curvature": curvature}
        columns.update({f"curvature_{arm}": values for arm, values in arms.items()})
        for name, values in columns.items():
            measured[name] = float(values[k].mean())
            measured[f"{name}_stderr"] = _stderr(values[k])
        found.append(
            Observed(
                epsilon=float(epsilon),
                trials=T,
                loss=float(losses[k].mean()) if T else math.nan,
                loss_stderr=_stderr(losses[k]) if T else math.nan,
                **measured,
            )
        )
    return found


def _clipping(curvature: Floats, unclipped: Floats | None) -> Change | None:
    """What clipping alone changes: the last epsilon, inf, against trials without it."""
    if unclipped is None:
        return None
    clipped = curvature[-1]
    return Change.between(
        float(clipped.mean()), _stderr(clipped), float(unclipped.mean()), _stderr(unclipped)
    )


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    shape: Shape
    z: Floats
    parameters: dict[str, Parameter]
    by_arm: dict[str, Parameter]
    at_zero: dict[str, float]
    """Share of bootstrap replicates in which a parameter is at the boundary."""


def _bootstrapped(
    epsilons: Floats,
    losses: Floats,
    curvature: Floats,
    arms: Mapping[str, Floats],
    replicates: int,
    seed: int,
) -> _Fitted:
    """Both stages on all trials, and on bootstrap samples of them."""
    T, weights = losses.shape[1], _weights(losses)
    shape, z, slope, c2 = _two_stages(epsilons, losses.mean(1), curvature.mean(1), weights)
    estimate = {"a": shape.a, "b": shape.b, "c": shape.c, "slope": slope, "c2": c2}
    estimate |= {arm: fit_curvature(z, values.mean(1))[0] for arm, values in arms.items()}
    generator = np.random.default_rng(seed)
    drawn: list[tuple[float, ...]] = []
    for _ in range(replicates if T > 1 else 0):
        trials = generator.integers(T, size=T)
        s, at, m, k = _two_stages(
            epsilons, losses[:, trials].mean(1), curvature[:, trials].mean(1), weights
        )
        of_arms = [fit_curvature(at, values[:, trials].mean(1))[0] for values in arms.values()]
        drawn.append((s.a, s.b, s.c, m, k, *of_arms))
    columns = np.array(drawn).T if drawn else np.empty((len(estimate), 0))
    found = {
        name: _parameter(value, column, T)
        for (name, value), column in zip(estimate.items(), columns, strict=True)
    }
    return _Fitted(
        shape=shape,
        z=z,
        parameters={name: found[name] for name in ("a", "b", "c", "slope", "c2")},
        by_arm={arm: found[arm] for arm in arms},
        at_zero={
            name: float(np.mean(column == 0))
            for name, column in zip(estimate, columns, strict=True)
            if len(column)
        },
    )


def _parameter(value: float, replicates: Floats, T: int) -> Parameter:
    """Percentiles of the bootstrap cover too little with twenty trials; these come near 95%."""
    low = high = math.nan
    finite = replicates[np.isfinite(replicates)]
    if len(finite) > 1 and value > 0:
        stderr = float(finite.std(ddof=1)) * math.sqrt(T / (T - 1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, T - 1)) * stderr
        low, high = max(0.0, value - half), value + half
    return Parameter(value=value, low=low, high=high, at_boundary=value == 0)


def _laws(epsilons: Floats, losses: Floats, curvature: Floats) -> list[Fit]:
    """The theorem's law and its rivals on finite epsilons, best cross-validated error first."""
    means, weights = curvature.mean(1), _weights(losses)

    def theorem(e: Floats, y: Floats) -> tuple[Predictor, dict[str, float]]:
        # L(eps) is its first stage, and comes from the losses of the same epsilons.
        rows = np.searchsorted(epsilons, e)
        law, _, m, k = _two_stages(e, losses.mean(1)[rows], y, weights[rows])
        return lambda at: m * law(at) * -np.expm1(-at) + k, {"slope": m, "c2": k, **vars(law)}

    fits = [compared("theorem", theorem, epsilons, means), *fit_rivals(epsilons, means)]
    return sorted(fits, key=lambda fit: fit.loo_rmse)


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


def _doubts(fitted: _Fitted, T: int, modes: list[str], fits: list[Fit]) -> list[str]:
    doubts = []
    if len(modes) > 1:
        doubts.append(f"curvature was computed in {len(modes)} modes: {', '.join(modes)}")
    if T < TRIALS_FOR_INTERVALS:
        doubts.append(
            f"{T} trials at each epsilon: intervals are too narrow with fewer than "
            f"{TRIALS_FOR_INTERVALS}"
        )
    if fitted.shape.b == 0:
        doubts.append("the loss does not fall with epsilon: b is 0, c means nothing")
    elif not RATES[0] * 1.01 < fitted.shape.c < RATES[-1] / 1.01:
        doubts.append(f"c is at the edge of what was tried ({fitted.shape.c:.3g}): not identified")
    if (parallel := condition(fitted.z)) > CONDITION:
        doubts.append(
            "slope and c2 are not identified: their columns are almost parallel (condition number "
            f"{parallel:.2g}); epsilons below 1 would tell them apart"
        )
    for name in ("slope", "c2"):
        doubts += _doubts_about(name, fitted.parameters[name], fitted.at_zero.get(name, 0.0))
    if fits[0].law != "theorem":
        ours = next(fit for fit in fits if fit.law == "theorem")
        doubts.append(
            f"the law {fits[0].law} predicts left-out epsilons better: error "
            f"{fits[0].loo_rmse:.3g}, the theorem's {ours.loo_rmse:.3g}"
        )
    return doubts


def _doubts_about(name: str, fitted: Parameter, at_zero: float) -> list[str]:
    if fitted.at_boundary:
        return [f"{name} is at the boundary of 0: the best fit would be negative"]
    doubts = []
    if fitted.high - fitted.low > 2 * fitted.value:
        doubts.append(f"{name} is hardly known: {fitted.shown()}")
    if at_zero > AT_ZERO:
        doubts.append(
            f"{name} is at the boundary of 0 in {100 * at_zero:.0f}% of bootstrap samples: its "
            "interval is not reliable"
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
