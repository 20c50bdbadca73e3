"""Curvature that was measured after training, under the models that a study kept.

In:  curvature/eps-inf-000017/*.parquet, one row per image, in any order.
Out: the columns that the trial would have if it had measured them itself.

Shapes: N training and M test examples. Rows of a trial are M test, then N train.
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
        study = store.study()["study"]
        self._rule = study.get("curvature")
        self._there = set() if self._rule is None else set(store.streamed_models())
        self._size = list(study["data"].get("image_shape", ()))[:2]
        train = index.filter(pc.equal(index["split"], "train"))
        self._ids = train["example_id"].combine_chunks() if self._there else None
        self._n_test = index.num_rows - train.num_rows

    def beside(
        self, key: TrialKey, table: pa.Table, about: dict[str, Any]
    ) -> tuple[pa.Table, dict[str, Any]]:
        """A trial's table and metadata, with what was measured after training.

        Raises StoreError if that was another model's.
        """
        name = f"{key.folder}-{key.trial:06d}"
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
            values[self._n_test + known] = found[rows]
            table = table.append_column(name, pa.array(values, from_pandas=True))
        return table
