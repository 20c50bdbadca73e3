"""Probable label errors: what models that did not see an example are sure is another class.

With labels that were flipped on purpose, how good each ranking is at finding them.

In:  scores/examples.parquet of a store. Out: `LabelErrors`.

Shapes: N training examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.encoding import epsilon_name
from raymem.errors import StoreError
from raymem.links.column_arrays import Floats, floats, train_at
from raymem.store import Store
from raymem.store.columns import Row
from raymem.store.measures import MEASURES, OTHER, SOFT

RANKINGS = [m for m in (*MEASURES.values(), OTHER, SOFT) if m.ranks_label_errors]
# Models without the example give its label less than this. Memorization is no condition: models
# that do not fit a wrong label are as sure that it is wrong.
UNBELIEVED = 0.1
SHOWN = (
    "example_id", "index", "label", "loss_out", "accuracy_out", "accuracy_in", "memorization",
    "memorization_low", "memorization_high", "n_in", "n_out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How well one column finds labels that were flipped."""

    column: str
    precision: float
    """Share of flipped labels among the first so many examples as labels were flipped."""
    average_precision: float
    """Mean precision at the places of the flipped ones; the share of flipped labels by chance."""


@dataclass(frozen=True, kw_only=True)
class LabelErrors:
    """Probable label errors at one epsilon."""

    epsilon: float
    known: bool
    """Is the loss or accuracy of models without the examples known? Published memorization alone
    does not say what is wrong."""
    rows: list[Row]
    """Training examples whose label gets a probability below 10% from models that did not train on
    them; the largest loss of these models first. Columns of the score table, and `class`, the
    label's name."""
    planted: int
    """How many labels were flipped on purpose."""
    precision: float
    """Of `rows`: share that was flipped; NaN if none was."""
    recall: float
    """Share of the flipped ones that are in `rows`; NaN if none was."""
    rankings: list[Ranking] = field(default_factory=list)
    """The best first; empty if no label was flipped."""


def label_errors(store: Store, epsilon: float = math.inf) -> LabelErrors:
    """Probable label errors of a scored store. Raises StoreError without scores at `epsilon`."""
    scored = store.scores()
    here = train_at(scored, epsilon)
    if not here.num_rows:
        known = ", ".join(map(epsilon_name, sorted(set(scored["epsilon"].to_pylist())))) or "none"
        raise StoreError(
            f"{store.url} has no scores at epsilon {epsilon_name(epsilon)}; there are {known}"
        )
    suspicion, believed = floats(here, "loss_out"), floats(here, "p_true_out")
    if not np.isfinite(suspicion).any():  # imported without margins
        believed = floats(here, "accuracy_out")
        suspicion = -believed
    likely = np.flatnonzero((believed < UNBELIEVED) & np.isfinite(suspicion))
    likely = likely[np.argsort(-suspicion[likely], kind="stable")]
    rows = here.select([name for name in SHOWN if name in here.column_names]).take(pa.array(likely))
    study = store.study()
    planted = np.array(study.flipped, np.int64)
    flipped = np.isin(np.arange(here.num_rows), planted)
    found = int(flipped[likely].sum())
    rankings = []
    if len(planted):
        for measure in RANKINGS:
            values = measure.values(here)
            if values is not None:
                rankings.append(rank(measure.name, values, flipped))
    return LabelErrors(
        epsilon=epsilon,
        known=bool(np.isfinite(suspicion).any()),
        rows=[
            {**row, "class": None if row["label"] is None else study.classes[row["label"]]}
            for row in rows.to_pylist()
        ],
        planted=len(planted),
        precision=found / len(likely) if len(planted) and len(likely) else math.nan,
        recall=found / len(planted) if len(planted) else math.nan,
        rankings=sorted(rankings, key=lambda r: -r.average_precision),
    )


def rank(column: str, values: Floats, flipped: NDArray[np.bool_]) -> Ranking:
    """How well `values` [N] find `flipped` bool [N]; unknown values come last, ties share places.

    >>> rank("x", np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False]))
    Ranking(column='x', precision=0.5, average_precision=0.8333333333333333)
    """
    known = np.where(np.isfinite(values), values, -np.inf)
    levels, place = np.unique(-known, return_inverse=True)
    size = np.bincount(place, minlength=len(levels)).astype(float)
    hits = np.bincount(place, weights=flipped, minlength=len(levels))
    above, hits_above = np.cumsum(size), np.cumsum(hits)
    n = int(flipped.sum())
    level = int(np.searchsorted(above, n))
    before, hits_before = above[level] - size[level], hits_above[level] - hits[level]
    within = hits[level] * (n - before) / size[level]
    return Ranking(
        column=column,
        precision=float((hits_before + within) / n),
        average_precision=float((hits / n * (hits_above / above)).sum()),
    )
