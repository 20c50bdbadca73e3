"""Joins the rows of a fleet to the examples of a data set; refuses what cannot be checked.

Fleets in published files are in an order of their own (that of TFDS, of torchvision, or anyone's).
The order is never assumed: rows are joined by ids or content hashes that the user gives, or by
labels that agree on every single row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raymem.data import ABSENT, Examples, example_id, repeated, rows_of
from raymem.errors import ImportFileError
from raymem.interop.safe import array_of, as_text, whole_numbers

Arrays = dict[str, np.ndarray]
SHOWN = 5
# Arrays with one column for each example, by split.
PER_EXAMPLE = {
    "train": ("masks", "correct_train", "margins_train"),
    "test": ("correct_test", "margins_test"),
}


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """Names in a .npy file, or in lines of a text file. Raises ImportFileError."""
    path = Path(path)
    if path.suffix == ".npy":
        return [as_text(value) for value in array_of(path).reshape(-1)]
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ImportFileError(f"{path} cannot be read as text; give a line for each id") from error


def labels_in(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Class numbers in a .npy file, or in lines of a text file. Raises ImportFileError."""
    values = names_in(path)
    try:
        found = np.array([float(value) for value in values])
    except ValueError as error:
        raise ImportFileError(f"{path} has labels that are no class numbers") from error
    return whole_numbers(found, f"labels in {path}")


def with_labels(arrays: Arrays, labels: NDArray[np.int64]) -> Arrays:
    """The arrays with y_train. Raises ImportFileError if they have other labels already."""
    known = arrays.get("y_train")
    if known is not None and not np.array_equal(known, labels):
        raise ImportFileError("the labels given are not those of the fleet; is the order another?")
    return {**arrays, "y_train": labels}


def joined(arrays: Arrays, data: Examples, ids: Mapping[str, Sequence[str]]) -> Arrays:
    """The arrays in the order of `data`, with its ids, labels, hashes and classes.

    `ids` name the rows of each split in the fleet's order: example ids, file names or content
    hashes. Without ids for a split its labels must be there and be those of `data`, row by row.

    Raises ImportFileError where examples are missing, or nothing can be checked.
    """
    out = {k: v for k, v in arrays.items() if not k.endswith("_ids") and k != "hashes"}
    for split in ("train", "test"):
        names = [name for name in PER_EXAMPLE[split] if name in arrays]
        if not names:
            continue
        width = arrays[names[0]].shape[1]
        if width == 0:
            continue
        given = ids.get(split) or [as_text(v) for v in arrays.get(f"{split}_ids", [])]
        order = order_in(data, split, width, given, arrays.get(f"y_{split}"))
        for name in names:
            out[name] = arrays[name][:, order]
        train = split == "train"
        out[f"y_{split}"] = data.y_train if train else data.y_test
        out[f"{split}_ids"] = np.array(data.train_ids if train else data.test_ids)
    n = len(out["y_train"]) + len(out.get("test_ids", []))
    out["hashes"] = np.array(data.content_hashes[:n])
    out["classes"] = np.array(data.classes)
    return out


def order_in(
    data: Examples,
    split: str,
    n: int,
    names: Sequence[str],
    labels: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """For each example of one split of `data`, its row among `n`, [N].

    `names` are the rows' ids, file names or content hashes; without, all `labels` must be the set's
    in the set's order. Raises ImportFileError where nothing can be checked, or a check fails.
    """
    train = split == "train"
    own, y = (data.train_ids, data.y_train) if train else (data.test_ids, data.y_test)
    if not names and labels is None:
        raise ImportFileError(
            f"nothing says which row is which {split} example: the files have no labels; give "
            f"--{'ids' if train else 'test-ids'} with an id, file name or content hash for each "
            "row, or leave --data out"
        )
    if n != len(own) or (names and len(names) != n):
        more = f", and {len(names)} ids are given" if names else ""
        raise ImportFileError(
            f"there are {n} {split} examples in it, {data.name} has {len(own)}{more}"
        )
    order = np.arange(n)
    if names:
        start = 0 if train else len(data.train_ids)
        order = _places(names, own, data.content_hashes[start : start + len(own)], split)
    if labels is not None and not np.array_equal(labels[order], y):
        wrong = int((labels[order] != y).sum())
        raise ImportFileError(
            f"{wrong} of {len(y)} {split} labels are not those of {data.name}: the order, or the "
            "labels' numbers, are others; give --ids"
        )
    return order


def _places(
    given: Sequence[str], own: Sequence[str], hashes: Sequence[str], split: str
) -> NDArray[np.int64]:
    """For each example of the set, its row in the fleet."""
    if repeated(given):
        raise ImportFileError(f"{split} ids repeat; each row needs its own")
    rows = rows_of(own, [example_id(name) for name in given])
    for names in (own, hashes):
        rows = np.where(rows == ABSENT, rows_of(names, given), rows)
    missing = [own[k] for k in np.flatnonzero(rows == ABSENT).tolist()]
    if missing:
        raise ImportFileError(
            f"{len(missing):,} {split} examples have no row in the fleet, such as "
            f"{', '.join(missing[:SHOWN])}; is it another set?"
        )
    return rows
