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

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from raymem.encoding import JsonObject
from raymem.links.column_arrays import Floats
from raymem.links.fits import Fit, Shape
from raymem.links.two_stages import CONFIDENCE, Parameter, bootstrapped, doubts, laws
from raymem.store import Store
from raymem.store.columns import Row

REPLICATES = 500
EPSILONS_FOR_FITS = 4
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


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
class Link2(JsonObject):
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

    def json_fields(self) -> Mapping[str, object]:
        """As links.json has it."""
        return {
            "measured_on": "training examples, in the subset or not",
            "observed": self.observed,
            "curvature_modes": self.curvature_modes,
            "clipped_at_inf": self.clipped_at_inf,
            "fitted_epsilons": [o.epsilon for o in self.fitted],
            "loss_fit": self.shape,
            "parameters": self.parameters,
            "slope_by_arm": self.slope_by_arm,
            "laws": self.fits,
            "spearman_of_curvature_with_epsilon": self.rises,
            "clipping": self.clipping,
            "warnings": self.warnings,
        }


def link2(store: Store, *, seed: int = 0) -> Link2:
    """Link 2 of a store with several epsilons. Raises StoreError without scores."""
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
    return fit_link2(
        np.array(epsilons),
        losses,
        curvature if measured else None,
        arms=arms,
        clipped_at_inf=_clipped(rows),
        modes=modes,
        seed=seed,
    )


def with_unclipped(link: Link2, store: Store, unclipped: Store) -> Link2:
    """`link` of `store`, with what clipping alone changes: where `store` clipped gradients at
    epsilon inf, and `unclipped` trained the same recipe there without clipping.
    """
    if not link.clipped_at_inf or store.study().recipe != unclipped.study().recipe:
        return link
    reference = _without_clipping(unclipped, link.curvature_modes)
    return dataclasses.replace(link, clipping=_clipping(link.observed, reference))


def _done(store: Store) -> list[Row]:
    return [row for row in store.scores("trials").to_pylist() if row["status"] == "done"]


def _matrix(
    rows: Sequence[Row],
    epsilons: Sequence[float],
    value_of: Callable[[Row], float | None],
) -> tuple[list[int], Floats]:
    """The trials that all epsilons have with a value, and the values [E, T]."""
    value = {(r["epsilon"], r["trial"]): value_of(r) for r in rows}
    value = {key: v for key, v in value.items() if v is not None}
    of_each = [{t for e, t in value if e == epsilon} for epsilon in epsilons]
    trials = sorted(set.intersection(*of_each)) if of_each else []
    return trials, np.array([[value[e, t] for t in trials] for e in epsilons], np.float64)


def _clipped(rows: Sequence[Row]) -> bool | None:
    """Were gradients clipped at epsilon inf? None without such trials."""
    norms = [row.get("max_grad_norm") for row in rows if math.isinf(row["epsilon"])]
    return all(norm is not None and math.isfinite(norm) for norm in norms) if norms else None


def _without_clipping(store: Store, modes: Sequence[str]) -> Floats | None:
    """Each trial's mean curvature at epsilon inf, [T], trained by the private mechanism's steps
    without clipping and noise; None if there are none, or curvature was computed in other modes."""
    rows = [r for r in _done(store) if math.isinf(r["epsilon"]) and r.get("max_grad_norm")]
    rows = [r for r in rows if math.isinf(r["max_grad_norm"]) and r["curvature_mode"] in modes]
    found = [_over_all(row, "curvature", store.plan().n) for row in rows]
    known = np.array([v for v in found if v is not None], np.float64)
    return known if len(known) else None


def _over_all(row: Row, name: str, N: int) -> float | None:
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
    base["clipping"] = _clipping(base["observed"], unclipped) if clipped_at_inf else None
    base["rises"] = _spearman(curvature[use].mean(1))
    finite = int(np.isfinite(epsilons).sum())
    if finite < EPSILONS_FOR_FITS:
        why = f"{finite} finite epsilons: too few to fit a law, {EPSILONS_FOR_FITS} are needed"
        return Link2(**base, fits=[], warnings=[why])
    chosen = epsilons[use], losses[use], curvature[use]
    fitted = bootstrapped(*chosen, {k: v[use] for k, v in arms.items()}, replicates, seed)
    fits = laws(*(values[np.isfinite(chosen[0])] for values in chosen))
    return Link2(
        **base,
        shape=fitted.shape,
        parameters=fitted.parameters,
        slope_by_arm=fitted.by_arm,
        fits=fits,
        warnings=doubts(fitted, T, modes, fits),
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


def _clipping(observed: Sequence[Observed], unclipped: Floats | None) -> Change | None:
    """What clipping alone changes: the last epsilon, inf, against trials without it."""
    clipped = observed[-1]
    if unclipped is None or clipped.curvature is None or clipped.curvature_stderr is None:
        return None
    return Change.between(
        clipped.curvature, clipped.curvature_stderr, float(unclipped.mean()), _stderr(unclipped)
    )


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _spearman(means: Floats) -> float:
    """With the order of epsilons."""
    if len(means) < 3:
        return math.nan
    ranks = means.argsort().argsort()
    return float(np.corrcoef(np.arange(len(means)), ranks)[0, 1])


def observed_table(link: Link2) -> pa.Table:
    """What was observed, a row for each epsilon."""
    return pa.Table.from_pylist([vars(o) for o in link.observed])
