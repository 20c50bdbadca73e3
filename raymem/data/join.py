"""The join by example id: which row of one table is that of another. The order is never assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ids: TypeAlias = "Sequence[str] | pa.ChunkedArray"
ABSENT = -1


def rows_of(wanted: Ids, ids: Ids) -> NDArray[np.int64]:
    """For each of the `wanted` ids its row among `ids`, or ABSENT; the first row of a repeated id.

    >>> rows_of(["b", "c", "a"], ["a", "b"]).tolist()
    [1, -1, 0]
    """
    found = pc.index_in(_array(wanted), value_set=_array(ids)).fill_null(ABSENT)
    rows: NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return rows


def repeated(ids: Ids) -> list[str]:
    """The ids that are there more than once, in the order of their first rows.

    >>> repeated(["a", "b", "a"])
    ['a']
    """
    counts = pc.value_counts(_array(ids))
    often: list[str] = counts.filter(pc.greater(counts.field("counts"), 1)).field(0).to_pylist()
    return often


def different(first: pa.ChunkedArray, second: pa.ChunkedArray) -> NDArray[np.int64]:
    """The rows in which both columns have a value, and not the same.

    >>> column = pa.chunked_array([[1, 2, None]])
    >>> different(column, pa.chunked_array([[1, 3, 4]])).tolist()
    [1]
    """
    differs = pc.not_equal(first, second.cast(first.type)).fill_null(False)
    rows: NDArray[np.int64] = np.flatnonzero(differs.to_numpy())
    return rows


def _array(ids: Ids) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        return ids.cast(pa.string()).combine_chunks()
    return pa.array(ids, pa.string())
