"""What memorization and curvature cost, each with the error it has for that.

Ravikumar et al. 2024 say that curvature is three orders of magnitude cheaper than the subset
estimator. What it is here depends on which error is asked for, and on whether the models that
curvature is measured under have to be trained for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymem.encoding import epsilon_name
from raymem.links.correlation import Correlation
from raymem.scores import forecast_trials
from raymem.store import Store
from raymem.store.trials import metadata_of

# At which reliability the two are compared.
TARGET = 0.9


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Device-seconds at one epsilon."""

    trials: int
    training_seconds: float
    """Of all trials: what memorization costs."""
    memorization_reliability: float
    """NaN if it is not known."""
    models_measured: int
    """Trials that measured curvature."""
    curvature_seconds: float
    """Of measuring under all of them, without their training; 0 if it was streamed."""
    curvature_reliability: float
    """Of curvature_out."""
    ratio: float
    """Training of all trials over training and measuring the models that measured."""
    ratio_without_training: float
    """Over measuring alone: where the models are there anyway."""
    ratio_at_target: float
    """Both at a reliability of 0.9, by extrapolation (Spearman and Brown): seconds of memorization
    over seconds of curvature with the training of its models. NaN if that cannot be told."""
    epochs_seconds: float
    """Of measuring in the epochs before the last, for curvature_over_training; 0 without it."""
    epochs_reliability: float
    """Of curvature_over_training_out; NaN without it."""
    epochs_ratio: float
    """As `ratio`, for curvature_over_training."""
    epochs_ratio_at_target: float
    """As `ratio_at_target`, for curvature_over_training."""


def costs(store: Store, found: Mapping[float, list[Correlation]]) -> dict[float, Costs]:
    """Of each epsilon at which curvature was measured. Raises StoreError without scores."""
    table = store.scores("trials")
    summary = _summaries(table)
    rows = [row for row in table.to_pylist() if row["status"] == "done"]
    result = {}
    for epsilon, correlations in found.items():
        here = [row for row in rows if row["epsilon"] == epsilon]
        measured = [row for row in here if row["curvature_mode"] is not None]
        if not here or not measured:
            continue
        seconds = math.fsum(row["seconds"] for row in here)
        measuring = math.fsum(row["curvature_seconds"] or 0.0 for row in measured)
        models = math.fsum(row["seconds"] for row in measured)
        reliability = summary.get(f"eps-{epsilon_name(epsilon)}", {}).get("reliability")
        mem = math.nan if reliability is None else float(reliability)
        of = {c.measure: c.reliability for c in correlations}
        curv = of.get("curvature_out", math.nan)
        over_training = of.get("curvature_over_training_out", math.nan)
        in_epochs = math.fsum(row.get("curvature_epochs_seconds") or 0.0 for row in measured)
        with_epochs = models + measuring + in_epochs if in_epochs else math.nan
        memorizing = seconds / len(here) * _trials_for(len(here), mem)
        result[epsilon] = Costs(
            trials=len(here),
            training_seconds=seconds,
            memorization_reliability=mem,
            models_measured=len(measured),
            curvature_seconds=measuring,
            curvature_reliability=curv,
            ratio=_over(seconds, models + measuring),
            ratio_without_training=_over(seconds, measuring),
            ratio_at_target=_over(
                memorizing, (models + measuring) / len(measured) * _trials_for(len(measured), curv)
            ),
            epochs_seconds=in_epochs,
            epochs_reliability=over_training,
            epochs_ratio=_over(seconds, with_epochs),
            epochs_ratio_at_target=_over(
                memorizing, with_epochs / len(measured) * _trials_for(len(measured), over_training)
            ),
        )
    return result


def _trials_for(trials: int, reliability: float) -> float:
    needed = forecast_trials(trials, reliability, TARGET)
    # max(1, NaN) would be 1.
    return needed if math.isnan(needed) else max(1.0, needed)


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan


def _summaries(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = metadata_of(table, "scores/trials.parquet").get("summary", {})
    return found
