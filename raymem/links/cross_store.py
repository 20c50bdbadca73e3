"""Memorization of one store against curvature of another: the same examples, other models.

Rows are joined by example id and checked by content hash and label, so that another set, or one in
another order, cannot be mistaken for this one.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymem.data import ABSENT, different, rows_of
from raymem.errors import StoreError
from raymem.links.column_arrays import floats, train_at
from raymem.links.correlation import Correlation, correlate
from raymem.links.folds import FixedScores, Folds, JoinedFolds
from raymem.store import Store
from raymem.store.measures import OTHER, known_measures

SHOWN = 3
# Columns that must agree where both stores have them, and what they are of.
CHECKED = {"content_hash": "pixels", "label": "labels"}


def correlations_across(
    first: Store, second: Store, *, seed: int = 0
) -> dict[float, list[Correlation]]:
    """Memorization at epsilon inf (or the largest) of `first` against measures of `second`, by the
    epsilon of the latter, and against its memorization.

    Over the training examples of `first`, all of which must be training examples of `second`: as in
    studies of another model, or another budget, on the same set. Raises StoreError if they are not
    the same examples, or if a store has no scores.
    """
    places = joined(first, second)
    mine, others = first.scores(), second.scores()
    epsilon = _last(mine)
    here = train_at(mine, epsilon)
    mem = floats(here, "memorization")
    mine_sums: Folds = FixedScores(mem)
    if first.scored(epsilon):
        mine_sums = Folds(train_at(first.scores("folds"), epsilon), [])
    found = {}
    for other in sorted(set(others["epsilon"].to_pylist())):
        there = train_at(others, other)
        all_values, its_mem = known_measures(there), floats(there, OTHER.name)
        its_sums: Folds
        if second.scored(other):
            its_sums = Folds(train_at(second.scores("folds"), other), list(all_values))
        else:
            its_sums = FixedScores(its_mem, {**all_values, OTHER.name: its_mem})
        if np.isfinite(its_mem).any():
            all_values[OTHER.name] = its_mem
        values = {name: v[places] for name, v in all_values.items()}
        sums = JoinedFolds(mine_sums, its_sums, places)
        found[other] = correlate(mem, values, sums, np.random.default_rng(seed))
    return found


def joined(first: Store, second: Store) -> NDArray[np.int64]:
    """Rows of the training examples of `second` that are those of `first`, in its order, [N].

    Raises StoreError naming the ids where ids, pixels or labels differ.
    """
    mine, others = _train(first), _train(second)
    ids = mine["example_id"]
    places = rows_of(ids, others["example_id"])
    missing = ids.filter(pa.array(places == ABSENT)).to_pylist()
    if missing:
        raise StoreError(
            f"{len(missing):,} training examples of {first.url} are not in {second.url}, such as "
            f"{', '.join(missing[:SHOWN])}; take two studies of one set"
        )
    if all(
        any(table[name].null_count == table.num_rows for table in (mine, others))
        for name in CHECKED
    ):
        raise StoreError(
            f"{first.url} and {second.url} have neither pixels' hashes nor labels in common, only "
            "ids, which two sets can share by accident; import with y_train"
        )
    theirs = others.take(places)
    for name, what in CHECKED.items():
        wrong = ids.take(different(mine[name], theirs[name])).to_pylist()
        if wrong:
            raise StoreError(
                f"{len(wrong):,} training examples have other {what} in {second.url} than in "
                f"{first.url}, such as {', '.join(wrong[:SHOWN])}; take two studies of one set"
            )
    return places


def _train(store: Store) -> pa.Table:
    index = store.examples()
    return index.filter(pc.equal(index["split"], "train"))


def _last(scores: pa.Table) -> float:
    epsilons = set(scores["epsilon"].to_pylist())
    return math.inf if math.inf in epsilons else max(epsilons)
