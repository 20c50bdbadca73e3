"""What a single model's measures say of memorization: the cheap proxies, as people use them.

One model is trained, and each example that it trained on is measured under it (Garg et al. 2024,
Ravikumar et al. 2024). A fleet has many such models: here each of the first few is taken by itself.
Memorization is that of the other folds of trials, so that no model's own outcomes are in it.

Shapes: N training examples, n of them in a model's subset.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from raymem.links.column_arrays import Floats, floats, train_at
from raymem.links.folds import Folds
from raymem.links.split_half import pearson
from raymem.scores import trial_folds
from raymem.store import Store, TrialKey
from raymem.store.columns import Row

# More only narrow the mean over models.
MOST_MODELS = 20
MEASURES_OF_ONE = (
    "curvature", "curvature_over_training", "curvature_paper", "gradient_norm", "loss",
    "cumulative_loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OneModel:
    """One measure under one model, averaged over models; each over its own subset."""

    measure: str
    """Column of the trial files, or loss: that of the trained model."""
    models: int
    """Models that it was looked at under, one at a time."""
    spearman: float
    """Rank correlation with memorization, mean over models."""
    spearman_low: float
    """The least of any model."""
    spearman_high: float
    """The greatest."""
    pearson: float
    """Correlation of values, mean over models."""
    agreement: float
    """Pearson's between two models over the examples that both trained on, mean over neighbours:
    the reliability of one model's measure. NaN with one model."""
    seconds: float
    """Of training one model and measuring this, mean over models; NaN if it is not known. The paper
    score's is counted with the trace's."""


def of_one_model(store: Store, epsilons: Sequence[float]) -> dict[float, list[OneModel]]:
    """Of the first trials that measured curvature themselves, by epsilon; empty without any.

    Raises StoreError without scores, and if the file of a scored trial is gone.
    """
    trials = store.scores("trials").to_pylist()
    found = {}
    for epsilon in epsilons:
        rows = [
            row
            for row in trials
            if row["epsilon"] == epsilon
            and row["status"] == "done"
            and row["curvature_seconds"] is not None
        ]
        if rows:
            found[epsilon] = _at(store, epsilon, rows[:MOST_MODELS])
    return found


def _at(store: Store, epsilon: float, rows: Sequence[Row]) -> list[OneModel]:
    sums = Folds(train_at(store.scores("folds"), epsilon), [])
    done = [key for key in store.done() if key.epsilon == epsilon]
    fold_of = trial_folds(done, store.plan())
    models = []
    for row in rows:
        key = TrialKey(epsilon, row["trial"])
        others = np.ones(sums.n_folds)
        if sums.can_be_halved:
            others[fold_of(key)] = 0
        mem = sums.memorization(others, np.arange(sums.n_examples))
        models.append((mem, *_measured(store, key), row))
    names = [name for name in MEASURES_OF_ONE if all(name in values for _, _, values, _ in models)]
    return [_of_measure(name, models) for name in names]


def _measured(store: Store, key: TrialKey) -> tuple[NDArray[np.bool_], dict[str, Floats]]:
    """In the subset [N], and the measures that this trial has, [N] each."""
    table = store.trial(key, ["in_subset", "margin", *MEASURES_OF_ONE])
    table = table.slice(0, table.num_rows - table["in_subset"].null_count)
    values = {n: floats(table, n) for n in table.column_names if n in MEASURES_OF_ONE}
    values["loss"] = np.logaddexp(0, -floats(table, "margin"))
    return table["in_subset"].to_numpy().astype(bool), values


def _of_measure(
    name: str,
    models: Sequence[tuple[Floats, NDArray[np.bool_], dict[str, Floats], Row]],
) -> OneModel:
    ranks, values, seconds = [], [], []
    for mem, inside, measures, row in models:
        x = measures[name]
        both = inside & np.isfinite(mem) & np.isfinite(x)
        ranks.append(_spearman(mem[both], x[both]))
        values.append(pearson(mem[both], x[both]) if both.any() else math.nan)
        seconds.append(_seconds(name, row))
    agreement = [
        _agreement(a[1] & b[1], a[2][name], b[2][name]) for a, b in itertools.pairwise(models)
    ]
    return OneModel(
        measure=name,
        models=len(models),
        spearman=float(np.mean(ranks)),
        spearman_low=min(ranks),
        spearman_high=max(ranks),
        pearson=float(np.mean(values)),
        agreement=float(np.mean(agreement)) if agreement else math.nan,
        seconds=float(np.mean(seconds)),
    )


def _spearman(a: Floats, b: Floats) -> float:
    return pearson(stats.rankdata(a), stats.rankdata(b)) if len(a) > 2 else math.nan


def _agreement(both: NDArray[np.bool_], a: Floats, b: Floats) -> float:
    known = both & np.isfinite(a) & np.isfinite(b)
    return pearson(a[known], b[known]) if known.any() else math.nan


def _seconds(name: str, row: Row) -> float:
    """Of one model: its training, and what this measure needs more."""
    more = 0.0
    if name.startswith(("curvature", "gradient")):
        more = row["curvature_seconds"]
    if name == "curvature_over_training":
        more += row["curvature_epochs_seconds"] or 0.0
    return float(row["seconds"]) + float(more)
