"""The candidates of a private study: the examples that an earlier one found most memorized."""

from __future__ import annotations

import math
import os

import numpy as np
import pyarrow.compute as pc

from raymem.data import Examples
from raymem.errors import PlanError
from raymem.store import Store

SHOWN = 3


def most_memorized(examples: Examples, store: str | os.PathLike[str], n: int) -> tuple[int, ...]:
    """Rows, among the training examples of `examples`, of the n that `store` finds most memorized.

    By the point estimate at epsilon inf (Ravikumar et al. 2024, section 6.5: 500 of CIFAR-100).
    Rows are joined by example id, and checked by content hash and label: another set, or one in
    another order, cannot be mistaken for this one.

    Raises PlanError if the store has no such examples, StoreError if it has no scores.
    """
    source = Store(store)
    scores, index = source.scores(), source.examples()
    here = pc.and_(pc.equal(scores["split"], "train"), pc.equal(scores["epsilon"], math.inf))
    rows = scores.filter(here).select(["example_id", "memorization"]).drop_null()
    if rows.num_rows < n:
        raise PlanError(
            f"{source.url} has memorization of {rows.num_rows:,} examples at epsilon inf, fewer "
            f"than {n:,}; train more trials there, or take a smaller pool"
        )
    order = [("memorization", "descending"), ("example_id", "ascending")]
    top = rows.take(pc.sort_indices(rows, order))
    chosen = top["example_id"].to_pylist()[:n]
    place = {example_id: row for row, example_id in enumerate(examples.train_ids)}
    there = {
        row["example_id"]: row
        for row in index.filter(pc.equal(index["split"], "train")).to_pylist()
    }
    hashes = examples.content_hashes
    wrong = [
        example_id
        for example_id in chosen
        if example_id not in place
        or there[example_id]["label"] != int(examples.y_train[place[example_id]])
        or there[example_id]["content_hash"] not in (None, hashes[place[example_id]])
    ]
    if wrong:
        raise PlanError(
            f"{len(wrong):,} of the {n:,} most memorized examples of {source.url} are not in "
            f"{examples.name} with the same pixels and label, such as {', '.join(wrong[:SHOWN])}; "
            "take the store of a study of the same set"
        )
    return tuple(np.sort([place[example_id] for example_id in chosen]).tolist())
