"""Streamed curvature beside a table of scores, by example id."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import StoreError
from raymem.store import Store, columns


def join_curvature(store: Store, scores: pa.Table, model: str) -> pa.Table:
    """`scores` with the columns of curvature/MODEL, by example_id; null where it has no score.

    Raises StoreError if there is no such model, if an id is there twice, if no id of the table is
    there, or if labels disagree.
    """
    streamed = store.curvature(model)
    streamed = streamed.filter(streamed["ok"])
    ids = streamed["example_id"].to_pylist()
    row_of = {example: row for row, example in enumerate(ids)}
    if len(row_of) < len(ids):
        twice = next(i for i, example in enumerate(ids) if row_of[example] != i)
        raise StoreError(
            f"curvature/{model} has {ids[twice]} more than once; score shards whose ids are unique"
        )
    wanted = scores["example_id"].to_pylist()
    rows = pa.array([row_of.get(example) for example in wanted], pa.int64())
    if rows.null_count == len(rows):
        raise StoreError(
            f"no example of the scores is in curvature/{model}: ids there are like "
            f"{', '.join(ids[:2]) or 'none'}, here like {', '.join(wanted[:2])}"
        )
    found = streamed.take(rows)
    both = pc.and_(found["label"].is_valid(), scores["label"].is_valid())
    wrong = pc.and_(both, pc.not_equal(found["label"], scores["label"].cast(pa.int64())))
    differ = np.flatnonzero(wrong.fill_null(False).to_numpy())
    if len(differ):
        raise StoreError(
            f"{len(differ):,} examples have another label in curvature/{model}, such as "
            f"{wanted[differ[0]]}: the ids mean other images there, or classes are numbered "
            "otherwise"
        )
    for name in columns.STREAMED_VALUES:
        if name in found.column_names:
            scores = scores.append_column(found.schema.field(name), found[name])
    return scores
