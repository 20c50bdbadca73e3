"""How a mean goes with epsilon: the paper's two equations, and the rivals they must beat.

Shapes: E epsilons, rising; inf may be the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from raymem.links.rows import Floats

# Decay rates of L(eps) that are tried, per unit of epsilon.
RATES = np.geomspace(1e-3, 30, 160)
# Exponents of the power law that are tried.
EXPONENTS = np.linspace(0.05, 3, 60)
# Parameters of each law; the theorem's loss has three more, fitted to other numbers.
FREE = {"theorem": 2, "constant": 1, "logarithm": 2, "power": 3}
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
    """`theorem`, `constant`, `logarithm`, `power` or `isotonic`."""
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
    problem with one solution; the best c is then refined.

    >>> eps = np.array([0.5, 1, 2, 4, 8, 16])
    >>> shape = fit_loss(eps, 0.5 + 2 * np.exp(-0.3 * eps))
    >>> [round(float(v), 3) for v in (shape.a, shape.b, shape.c)]
    [0.5, 2.0, 0.3]
    """
    root = np.ones(len(epsilons)) if weights is None else np.sqrt(weights / np.max(weights))

    def solved(c: float) -> tuple[float, Floats]:
        design = np.stack([np.ones(len(epsilons)), np.exp(-c * epsilons)], 1)
        found, residual = optimize.nnls(design * root[:, None], losses * root)
        return float(residual), found

    best = min(RATES, key=lambda c: solved(c)[0])
    fine = optimize.minimize_scalar(
        lambda log_c: solved(math.exp(log_c))[0],
        bounds=(math.log(best) - 0.1, math.log(best) + 0.1),
        method="bounded",
    )
    c = min((float(best), math.exp(fine.x)), key=lambda rate: solved(rate)[0])
    _, (a, b) = solved(c)
    return Shape(a=float(a), b=float(b), c=c if b > 0 else math.nan)


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
    """Laws without a theorem, fitted to values [E] at finite epsilons [E], best first.

    constant; a + b log(1 + eps); a + b eps^p with b >= 0; isotonic (rising, no form).
    """
    laws: dict[str, Fitter] = {
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
    """Of residuals [E] of a law with so many free parameters; see `Fit`.

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
