"""Laws of a mean against epsilon: the paper's two equations, and rivals.

Shapes: E epsilons, rising; inf may be the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from raymem.links.column_arrays import Floats

# Decay rates of L(eps) that are tried, per unit of epsilon.
RATES = np.geomspace(1e-3, 30, 160)
# Exponents of the power law that are tried.
EXPONENTS = np.linspace(0.05, 3, 60)
# Parameters of each law; the theorem's loss has three more, fitted to other numbers.
FREE = {"theorem": 2, "theorem-constant-loss": 2, "constant": 1, "logarithm": 2, "power": 3}
# Parameters whose columns are this near to parallel cannot be told apart.
CONDITION = 1e3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """L(eps) = a + b e^{-c eps}, a and b not negative (Ravikumar et al. 2024, section 6.4)."""

    a: float
    b: float
    c: float
    """Per unit of epsilon; NaN if b is 0."""

    def __call__(self, epsilons: Floats) -> Floats:
        """The fitted loss."""
        decay = 0.0 if math.isnan(self.c) else self.b * np.exp(-self.c * epsilons)
        return np.asarray(self.a + decay + 0 * np.where(np.isinf(epsilons), 0, epsilons))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One law fitted to means at several epsilons, and how it does on those it did not see."""

    law: str
    """`theorem`, `theorem-constant-loss`, `constant`, `logarithm`, `power` or `isotonic`."""
    parameters: dict[str, float]
    rmse: float
    """Root mean squared residual."""
    loo_rmse: float
    """The same where each epsilon is predicted from the others: what laws are compared by."""
    aicc: float
    """Akaike's criterion, corrected for few epsilons (Hurvich & Tsai 1989): E log(mean squared
    residual) + 2k + 2k(k + 1)/(E - k - 1), k the free parameters and the variance. Less is better;
    NaN with too few epsilons for it, and for laws that go through every point."""


def fit_loss(epsilons: Floats, losses: Floats, weights: Floats | None = None) -> Shape:
    """The shape that fits losses [E] best, by least squares with `weights` [E] (1 / variance).

    Variable projection: for every rate c of a fine grid a and b are a nonnegative least-squares
    problem with one solution, in closed form; the best c is then refined.

    >>> eps = np.array([0.5, 1, 2, 4, 8, 16])
    >>> shape = fit_loss(eps, 0.5 + 2 * np.exp(-0.3 * eps))
    >>> [round(float(v), 3) for v in (shape.a, shape.b, shape.c)]
    [0.5, 2.0, 0.3]
    """
    w = np.ones(len(epsilons)) if weights is None else np.asarray(weights / np.max(weights))
    error, _, _ = _for_rates(RATES, epsilons, losses, w)
    best = float(RATES[int(error.argmin())])
    fine = optimize.minimize_scalar(
        lambda log_c: float(_for_rates(np.exp([log_c]), epsilons, losses, w)[0][0]),
        bounds=(math.log(best) - 0.1, math.log(best) + 0.1),
        method="bounded",
    )
    rates = np.array([best, math.exp(fine.x)])
    error, a, b = _for_rates(rates, epsilons, losses, w)
    k = int(error.argmin())
    return Shape(a=float(a[k]), b=float(b[k]), c=float(rates[k]) if b[k] > 0 else math.nan)


def _for_rates(rates: Floats, epsilons: Floats, losses: Floats, w: Floats) -> tuple[Floats, ...]:
    """Weighted squared error, a and b of the best a + b e^{-c eps} with a, b >= 0, for each rate.

    The best of three solutions: both free, if that has no negative one, a = 0, and b = 0.
    """
    x = np.exp(-rates[:, None] * epsilons)
    total, sx, sy = w.sum(), x @ w, float(w @ losses)
    sxx, sxy = (x**2) @ w, x @ (w * losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        b = (total * sxy - sx * sy) / (total * sxx - sx**2)
        alone = np.maximum(np.where(sxx > 0, sxy / sxx, 0), 0)
    a = (sy - b * sx) / total
    free = (a >= 0) & (b >= 0)
    zero = np.zeros_like(alone)
    candidates_a = np.stack([np.where(free, a, 0), zero, np.full_like(zero, max(sy / total, 0))])
    candidates_b = np.stack([np.where(free, b, 0), alone, zero])
    fitted = candidates_a[..., None] + candidates_b[..., None] * x
    error = ((losses - fitted) ** 2) @ w
    k, at = error.argmin(0), np.arange(len(rates))
    return error[k, at], candidates_a[k, at], candidates_b[k, at]


def fit_curvature(z: Floats, curvature: Floats) -> tuple[float, float]:
    """(slope, c2) of curvature = slope z + c2, neither negative: eq. 16, z = L(eps)(1 - e^-eps).

    The slope stands where the theorem has m + 1. It is not m + 1: with that, the bound is some
    million times above every curvature that was ever measured.
    """
    design = np.stack([z, np.ones(len(z))], 1)
    scale = np.maximum(design.max(0), 1e-300)
    (slope, c2), _ = optimize.nnls(design / scale, curvature)
    return float(slope / scale[0]), float(c2 / scale[1])


def condition(z: Floats) -> float:
    """How near slope and c2 are to the same thing: the condition number of their columns.

    Large where z hardly varies; then only their sum is known.
    """
    design = np.stack([z, np.ones(len(z))], 1)
    norms = np.linalg.norm(design, axis=0)
    return float(np.linalg.cond(design / np.where(norms > 0, norms, 1)))


Predictor = Callable[[Floats], Floats]
Fitter = Callable[[Floats, Floats], tuple[Predictor, dict[str, float]]]


def fit_rivals(epsilons: Floats, values: Floats) -> list[Fit]:
    """Rivals of eq. 16, fitted to values [E] at finite epsilons [E], best first.

    Eq. 16 with a loss that does not depend on epsilon, slope (1 - e^-eps) + c2, neither negative;
    constant; a + b log(1 + eps); a + b eps^p with b >= 0; isotonic (rising, no form).
    """
    laws: dict[str, Fitter] = {
        "theorem-constant-loss": _constant_loss,
        "constant": _constant,
        "logarithm": _logarithm,
        "power": _power,
        "isotonic": _isotonic,
    }
    found = [compared(name, fitter, epsilons, values) for name, fitter in laws.items()]
    return sorted(found, key=lambda fit: fit.loo_rmse)


def compared(law: str, fitter: Fitter, epsilons: Floats, values: Floats) -> Fit:
    """A law fitted to all, and judged on each epsilon from the others."""
    predict, parameters = fitter(epsilons, values)
    residual = values - predict(epsilons)
    # The isotonic law has as many parameters as levels.
    free = FREE.get(law) or len(np.unique(predict(epsilons)))
    left_out = []
    for k in range(len(epsilons)):
        rest = np.arange(len(epsilons)) != k
        without, _ = fitter(epsilons[rest], values[rest])
        left_out.append(values[k] - without(epsilons[k : k + 1])[0])
    return Fit(
        law=law,
        parameters=parameters,
        rmse=_rms(residual),
        loo_rmse=_rms(left_out),
        aicc=aicc(residual, free),
    )


def aicc(residual: Floats, free: int) -> float:
    """Corrected Akaike criterion from residuals [E] and the number of free parameters; see `Fit`.

    >>> round(aicc(np.array([1.0, -1, 1, -1, 1, -1, 1, -1]), 1), 2)
    6.4
    """
    n, k = len(residual), free + 1
    mean = float(np.mean(residual**2))
    if n - k - 1 <= 0 or mean == 0:
        return math.nan
    return n * math.log(mean) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _rms(values: Floats | Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _constant_loss(epsilons: Floats, values: Floats) -> tuple[Predictor, dict[str, float]]:
    slope, c2 = fit_curvature(-np.expm1(-epsilons), values)
    return lambda e: -slope * np.expm1(-e) + c2, {"slope": slope, "c2": c2}


def _constant(epsilons: Floats, values: Floats) -> tuple[Predictor, dict[str, float]]:
    mean = float(values.mean())
    return lambda e: np.full(len(e), mean), {"a": mean}


def _line(x: Floats, values: Floats) -> tuple[float, float]:
    design = np.stack([np.ones(len(x)), x], 1)
    a, b = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(a), float(b)


def _logarithm(epsilons: Floats, values: Floats) -> tuple[Predictor, dict[str, float]]:
    a, b = _line(np.log1p(epsilons), values)
    return lambda e: a + b * np.log1p(e), {"a": a, "b": b}


def _power(epsilons: Floats, values: Floats) -> tuple[Predictor, dict[str, float]]:
    best = (math.inf, 0.0, 0.0, 1.0)
    for p in EXPONENTS:
        a, b = _line(epsilons**p, values)
        if b < 0:
            a, b = float(values.mean()), 0.0
        error = _rms(values - a - b * epsilons**p)
        best = min(best, (error, a, b, float(p)))
    _, a, b, p = best
    return lambda e: a + b * e**p, {"a": a, "b": b, "p": p}


def _isotonic(epsilons: Floats, values: Floats) -> tuple[Predictor, dict[str, float]]:
    fitted = optimize.isotonic_regression(values).x
    return lambda e: np.interp(e, epsilons, fitted), {}
