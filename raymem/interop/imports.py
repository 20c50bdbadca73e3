"""A fleet trained elsewhere, in files of one of `FORMATS` -> a store, scored like any other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from raymem.data import Examples
from raymem.errors import ImportFileError
from raymem.interop.crosswalk import joined, labels_in, names_in, with_labels
from raymem.interop.fleets import check_keys, import_arrays
from raymem.interop.layouts import FORMATS
from raymem.interop.safe import laid_out
from raymem.store import Store


def import_fleet(
    format: str,
    path: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    data: Examples | None = None,
    labels: str | os.PathLike[str] | None = None,
    ids: str | os.PathLike[str] | None = None,
    test_ids: str | os.PathLike[str] | None = None,
    trials: int | None = None,
) -> Store:
    """A store of a fleet in one of FORMATS; `score` it next.

    `labels` is a file with the training examples' class numbers, `ids` and `test_ids` are files
    with an id, file name or content hash for each example, all in the order of the fleet (.npy, or
    lines of text). With `data` the fleet's rows are put in the order of that set, and checked:
    by `ids`, or by labels that agree on every row. `trials` takes the first so many models only;
    more of them later are another study.

    Raises ImportFileError for what is damaged or cannot be checked, StudyMismatchError if the store
    has another study.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ImportFileError(f"no format {format!r}; take one of {', '.join(FORMATS)}")
    y = None if labels is None else labels_in(labels)
    if y is None and data is not None and ids is None:
        y = data.y_train
    with laid_out(path, format):
        arrays = FORMATS[format](path, y, trials)
    check_keys(arrays, path)
    if labels is not None and y is not None:
        arrays = with_labels(arrays, y)
    named = {split: names_in(file) for split, file in (("train", ids), ("test", test_ids)) if file}
    if data is not None:
        arrays = joined(arrays, data, named)
    else:
        arrays |= {f"{split}_ids": np.array(names) for split, names in named.items()}
    return import_arrays(arrays, store, name=path.stem, path=path)


def import_npz(path: str | os.PathLike[str], store: str | os.PathLike[str]) -> Store:
    """A store of the fleet in an .npz file: `import_fleet` of that format; `score` it next."""
    return import_fleet("npz", path, store)
