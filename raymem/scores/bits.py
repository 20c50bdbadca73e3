"""A [T, n] table of true and false, kept packed: what masks and outcomes of a fleet are held in.

Shapes: T trials, n examples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


class Bits:
    """A [T, n] table of true and false, kept packed: eight to a byte.

    >>> bits = Bits(3)
    >>> bits.append(np.array([True, False, True]))
    >>> bits.columns(0, 2).tolist(), bits.take(np.array([2, 1])).tolist(), len(bits)
    ([[1.0, 0.0]], [[1.0, 0.0]], 1)
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: list[NDArray[np.uint8]] = []

    @classmethod
    def of(cls, table: ArrayLike) -> Bits:
        """From a bool [T, n] array."""
        array = np.asarray(table, bool)
        bits = cls(array.shape[1])
        for row in array:
            bits.append(row)
        return bits

    def append(self, row: NDArray[np.bool_]) -> None:
        """Add one trial's row, [n]."""
        if row.shape != (self.width,):
            raise ValueError(f"a row of {self.width} is needed, got {row.shape}")
        self._rows.append(np.packbits(row))

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self, start: int, stop: int) -> NDArray[np.float32]:
        """Columns start..stop-1 of all trials as 0.0 and 1.0, [T, stop - start]; start % 8 == 0."""
        stop = min(stop, self.width)
        packed = [row[start // 8 : -(-stop // 8)] for row in self._rows]
        if not packed:
            return np.zeros((0, stop - start), np.float32)
        table = np.unpackbits(np.stack(packed), axis=1, count=stop - start)
        return table.astype(np.float32)

    def take(self, indices: Ints) -> NDArray[np.float32]:
        """Columns `indices` of all trials as 0.0 and 1.0, [T, len(indices)].

        Besides the answer it takes a byte for each of its entries: of the other columns, none is
        unpacked.
        """
        if len(indices) and indices[0] % 8 == 0 and (np.diff(indices) == 1).all():
            return self.columns(int(indices[0]), int(indices[-1]) + 1)
        table = np.empty((len(self._rows), len(indices)), np.uint8)
        byte = indices >> 3
        for row, found in zip(self._rows, table, strict=True):
            np.take(row, byte, out=found, mode="clip")  # the mode that needs no buffer
        table &= (128 >> (indices & 7)).astype(np.uint8)
        chosen: NDArray[np.float32] = (table != 0).astype(np.float32)
        return chosen

    def counts(self) -> Ints:
        """True entries per column, [n]."""
        total = np.zeros(self.width, np.int64)
        for row in self._rows:
            total += np.unpackbits(row, count=self.width)
        return total
