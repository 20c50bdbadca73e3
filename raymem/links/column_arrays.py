"""Rows and columns of score tables as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# 1 - 0.8 is a little below 0.2; in its bin it belongs all the same.
ROUNDING = 1e-9


def train_at(table: pa.Table, epsilon: float) -> pa.Table:
    """The training examples' rows at one epsilon."""
    here = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["epsilon"], epsilon))
    return table.filter(here)


def floats(table: pa.Table, name: str) -> Floats:
    """A column as floats; null is NaN."""
    values: Floats = table[name].cast(pa.float64()).to_numpy()
    return values
