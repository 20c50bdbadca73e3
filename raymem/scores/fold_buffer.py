"""Buffers the sums of folds on the local disk until the metadata of their table is known.

The metadata of scores/folds.parquet has results of all folds, so it is written last. For ImageNet a
fold's sums are 122 MB and there are 20: they wait in a file without a name, where TMPDIR says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np

# The columns of one fold in scores/folds.parquet.
FoldColumns = dict[str, np.ndarray]


class FoldBuffer:
    """Folds added one by one, and given back in their order; gone with the `with` block.

    >>> with FoldBuffer() as folds:
    ...     folds.add(0.5, 0, {"n_in": np.array([3, 4])})
    ...     [(epsilon, fold, sums["n_in"].tolist()) for epsilon, fold, sums in folds]
    [(0.5, 0, [3, 4])]
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        """The sums that any fold has."""
        self._file = tempfile.TemporaryFile(prefix="raymem-folds-")  # noqa: SIM115, closed on exit
        self._folds: list[tuple[float, int, list[str]]] = []

    def __enter__(self) -> FoldBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, epsilon: float, fold: int, sums: FoldColumns) -> None:
        """Keep the sums of one fold."""
        self._folds.append((epsilon, fold, list(sums)))
        self.names |= sums.keys()
        for values in sums.values():
            np.save(self._file, values, allow_pickle=False)

    def __iter__(self) -> Iterator[tuple[float, int, FoldColumns]]:
        """(epsilon, fold, its sums), one in memory at a time; not while folds are added."""
        self._file.seek(0)
        for epsilon, fold, names in self._folds:
            yield epsilon, fold, {name: np.load(self._file, allow_pickle=False) for name in names}
