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

from raymem.data import ABSENT, different, repeated, rows_of
from raymem.errors import StoreError
from raymem.store import Store, TrialKey, columns
from raymem.store.trials import CurvatureProvenance, Provenance


class StreamedCurvature:
    """The streamed curvature of a store; empty if its study measures none."""

    def __init__(self, store: Store, index: pa.Table) -> None:
        """`index` is examples.parquet, train first."""
        self._store = store
        study = store.study()
        self._rule = study.curvature
        self._there = set() if self._rule is None else set(store.streamed_models())
        self._size = list(study.image_shape[:2])
        train = index.filter(pc.equal(index["split"], "train"))
        self._ids = train["example_id"]

    def beside(
        self, key: TrialKey, table: pa.Table, about: Provenance
    ) -> tuple[pa.Table, Provenance]:
        """A trial's table and provenance, with curvature that was measured after training.

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
        measured: CurvatureProvenance = {
            "mode": record["mode"],
            "rule": record["rule"],
            "seconds": None,
        }
        return self._with(table, self._store.curvature(name)), {**about, "curvature": measured}

    def _is_ours(self, record: Mapping[str, Any]) -> bool:
        """Was it measured by the study's rule, on images as the study has them?"""
        transform = record["transform"]
        same_images = transform["way"] == "fit" and transform["size"] == self._size
        return bool(same_images and record["rule"] == self._rule)

    def _with(self, table: pa.Table, streamed: pa.Table) -> pa.Table:
        streamed = streamed.filter(streamed["ok"])
        rows = rows_of(self._ids, streamed["example_id"])
        known = np.flatnonzero(rows != ABSENT)
        for name in columns.TRIAL_CURVATURE:
            if name not in streamed.column_names:
                continue
            found = streamed[name].combine_chunks().to_numpy(zero_copy_only=False)
            values = np.full(table.num_rows, np.nan, np.float32)
            values[known] = found[rows[known]]
            table = table.append_column(name, pa.array(values, from_pandas=True))
        return table


def join_curvature(store: Store, scores: pa.Table, model: str) -> pa.Table:
    """`scores` with the columns of curvature/MODEL, by example_id; null where it has no score.

    Raises StoreError if there is no such model, if an id is there twice, if no id of the table is
    there, or if labels disagree.
    """
    streamed = store.curvature(model)
    streamed = streamed.filter(streamed["ok"])
    twice = repeated(streamed["example_id"])
    if twice:
        raise StoreError(
            f"curvature/{model} has {twice[0]} more than once; score shards whose ids are unique"
        )
    rows = rows_of(scores["example_id"], streamed["example_id"])
    if (rows == ABSENT).all():
        there, here = (", ".join(t["example_id"][:2].to_pylist()) for t in (streamed, scores))
        raise StoreError(
            f"no example of the scores is in curvature/{model}: ids there are like "
            f"{there or 'none'}, here like {here}"
        )
    found = streamed.take(pa.array(rows, mask=rows == ABSENT))
    wrong = different(found["label"], scores["label"])
    if len(wrong):
        raise StoreError(
            f"{len(wrong):,} examples have another label in curvature/{model}, such as "
            f"{scores['example_id'][wrong[0]]}: the ids mean other images there, or classes are "
            "numbered otherwise"
        )
    for name in columns.STREAMED_VALUES:
        if name in found.column_names:
            scores = scores.append_column(found.schema.field(name), found[name])
    return scores
