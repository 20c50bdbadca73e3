"""Curvature that was streamed over shards: as a trial's columns, or beside a table of scores.

In:  curvature/eps-inf-000017/*.parquet, one row per image, in any order: measured after training,
     under the models that a study kept.
Out: the columns that the trial would have if it had measured them itself.

`join_curvature` puts the columns of any curvature/MODEL beside a table of scores, by example id.

Shapes: N training and M test examples. Rows of a trial are N train, then M test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import StoreError
from raymem.store import Store, TrialKey, columns


class StreamedCurvature:
    """What a store has of it; none if its study measures no curvature."""

    def __init__(self, store: Store, index: pa.Table) -> None:
        """`index` is examples.parquet, train first."""
        self._store = store
        study = store.study()
        self._rule = study.curvature
        self._there = set() if self._rule is None else set(store.streamed_models())
        self._size = list(study.image_shape[:2])
        train = index.filter(pc.equal(index["split"], "train"))
        self._ids = train["example_id"].combine_chunks() if self._there else None

    def beside(
        self, key: TrialKey, table: pa.Table, about: dict[str, Any]
    ) -> tuple[pa.Table, dict[str, Any]]:
        """A trial's table and metadata, with what was measured after training.

        Raises StoreError if that was another model's.
        """
        name = key.name
        if "curvature" in table.column_names or name not in self._there:
            return table, about
        record = json.loads(self._store.files.read(f"curvature/{name}/_about.json"))
        if not self._is_ours(record):
            return table, about
        if record["weights"] != about.get("weights"):
            raise StoreError(
                f"curvature/{name} was measured under another model than that of {key}; delete "
                "that folder, and run the job's `curvature` stage again"
            )
        return self._with(table, self._store.curvature(name)), {
            **about,
            "curvature": {"mode": record["mode"], "seconds": None},
        }

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        """By the study's rule, and of images as the study has them."""
        transform = record["transform"]
        same_images = transform["way"] == "fit" and transform["size"] == self._size
        return bool(same_images and record["rule"] == self._rule)

    def _with(self, table: pa.Table, streamed: pa.Table) -> pa.Table:
        streamed = streamed.filter(streamed["ok"])
        at = pc.index_in(self._ids, value_set=streamed["example_id"].combine_chunks())
        known = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        rows = at.drop_null().to_numpy()
        for name in columns.TRIAL_CURVATURE:
            if name not in streamed.column_names:
                continue
            found = streamed[name].combine_chunks().to_numpy(zero_copy_only=False)
            values = np.full(table.num_rows, np.nan, np.float32)
            values[known] = found[rows]
            table = table.append_column(name, pa.array(values, from_pandas=True))
        return table


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
