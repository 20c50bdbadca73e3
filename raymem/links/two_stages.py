"""The two stages of link 2: the loss against epsilon, curvature against what is fitted to it.

Intervals are a bootstrap over trials through both stages; rivals are judged on left-out epsilons.

Shapes: E epsilons, T trials (subset numbers) that all epsilons have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from raymem.links.column_arrays import Floats
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

CONFIDENCE = 0.95
# With fewer trials at each epsilon bootstrap intervals are too narrow (c was covered 80% with 10).
TRIALS_FOR_INTERVALS = 20
# With more bootstrap samples at a parameter's boundary than this an end of its interval is there.
AT_ZERO = 0.025


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

    def format(self) -> str:
        """As text.

        >>> Parameter(value=0.0, low=math.nan, high=math.nan, at_boundary=True).format()
        '0 (at the boundary)'
        """
        if self.at_boundary:
            return "0 (at the boundary)"
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Both stages, fitted."""

    shape: Shape
    z: Floats
    parameters: dict[str, Parameter]
    by_arm: dict[str, Parameter]
    at_zero: dict[str, float]
    """Share of bootstrap replicates in which a parameter is at the boundary."""


def bootstrapped(
    epsilons: Floats,
    losses: Floats,
    curvature: Floats,
    arms: Mapping[str, Floats],
    replicates: int,
    seed: int,
) -> Fitted:
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
    return Fitted(
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


def laws(epsilons: Floats, losses: Floats, curvature: Floats) -> list[Fit]:
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


def doubts(fitted: Fitted, T: int, modes: list[str], fits: list[Fit]) -> list[str]:
    """Why not to believe a fit."""
    found = []
    if len(modes) > 1:
        found.append(f"curvature was computed in {len(modes)} modes: {', '.join(modes)}")
    if T < TRIALS_FOR_INTERVALS:
        found.append(
            f"{T} trials at each epsilon: intervals are too narrow with fewer than "
            f"{TRIALS_FOR_INTERVALS}"
        )
    if fitted.shape.b == 0:
        found.append("the loss does not fall with epsilon: b is 0, c means nothing")
    elif not RATES[0] * 1.01 < fitted.shape.c < RATES[-1] / 1.01:
        found.append(f"c is at the edge of what was tried ({fitted.shape.c:.3g}): not identified")
    if (parallel := condition(fitted.z)) > CONDITION:
        found.append(
            "slope and c2 are not identified: their columns are almost parallel (condition number "
            f"{parallel:.2g}); epsilons below 1 would tell them apart"
        )
    for name in ("slope", "c2"):
        found += _doubts_about(name, fitted.parameters[name], fitted.at_zero.get(name, 0.0))
    if fits[0].law != "theorem":
        ours = next(fit for fit in fits if fit.law == "theorem")
        found.append(
            f"the law {fits[0].law} predicts left-out epsilons better: error "
            f"{fits[0].loo_rmse:.3g}, the theorem's {ours.loo_rmse:.3g}"
        )
    return found


def _doubts_about(name: str, fitted: Parameter, at_zero: float) -> list[str]:
    if fitted.at_boundary:
        return [f"{name} is at the boundary of 0: the best fit would be negative"]
    doubts = []
    if fitted.high - fitted.low > 2 * fitted.value:
        doubts.append(f"{name} is hardly known: {fitted.format()}")
    if at_zero > AT_ZERO:
        doubts.append(
            f"{name} is at the boundary of 0 in {100 * at_zero:.0f}% of bootstrap samples: its "
            "interval is not reliable"
        )
    return doubts
