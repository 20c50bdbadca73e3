"""Published scores without a fleet -> a store of scores and pairs.

fz-scores   Feldman & Zhang's *_infl_matrix.npz (tr_mem, tr_labels, tt_labels, infl_matrix_class{K},
            tr_classidx_{K}, tt_classidx_{K}), with their *_index.npz beside it if there is one; or
            *_index.npz (tr_mem, tr_labels, tt_labels, tr_filenames, tt_filenames) with their
            *_high_infl_pairs_*.npz (tr_idx, tt_idx, infl, mem) beside it if there is one; or
            *_high_infl_pairs_*.npz alone, with the data set: memorization is then known of the
            training examples in pairs only. raymem's own export has no * before the names
c-scores    *-cscores-*.npz (labels, scores, filenames): Jiang et al. 2021's consistency, the
            accuracy on an example of models that did not see it: column accuracy_out

They have no counts, no errors and no intervals: those columns are null, and what needs them says
so.

Shapes: N training and M test examples.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.data import Examples, example_id
from raymem.errors import ImportFileError
from raymem.interop.crosswalk import order_in
from raymem.interop.fleets import make_study
from raymem.interop.safe import arrays_of, as_text, laid_out, numbers, whole_numbers
from raymem.plan import Plan
from raymem.scores import PairRule
from raymem.store import Store, columns

Arrays = dict[str, np.ndarray]
# Endings of the names of Feldman & Zhang's files of one set.
PARTS = ("infl_matrix", "index", "high_infl_pairs")
PAIRS = {"tr_idx", "tt_idx", "infl", "mem"}
SAME = 1e-4
# Largest probability that another order would pass the check of pairs alone.
BY_CHANCE = 1e-6


def import_scores(
    path: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    data: Examples | None = None,
) -> Store:
    """A store of published scores; nothing is left to score. With `data`, rows get its ids and
    hashes: they are joined by file names, or else all labels must agree row by row. Pairs alone
    have no labels and need `data`: the examples of a published pair have one class, and they must
    have one there. This detects an order that mixes classes, not one that differs within them.

    Raises ImportFileError for other files, and where rows cannot be joined.
    """
    path = Path(path)
    arrays = _with_beside(path)
    if {"tr_mem", "tr_labels"} <= set(arrays):
        with laid_out(path, "published scores"):
            found = _memorization(arrays, path)
    elif set(arrays) >= PAIRS:
        if data is None:
            raise ImportFileError(
                f"{path} has pairs only, with no labels to check them by; give --data, or put the "
                "*_index.npz or the *_infl_matrix.npz of the same set beside it"
            )
        with laid_out(path, "published pairs"):
            found = _pairs_alone(arrays, data, path)
    elif {"labels", "scores"} <= set(arrays):
        found = _consistency(arrays, path)
    else:
        raise ImportFileError(
            f"{path} has {', '.join(sorted(arrays)[:6])}; published scores have tr_mem and "
            "tr_labels, or labels and scores"
        )
    if data is not None:
        found = _joined(found, data)
    return _write(found, Store(store), path)


def _with_beside(path: Path) -> Arrays:
    """The file's arrays, and those of the other files of the same set beside it: what both have
    must be the same."""
    arrays = arrays_of(path)
    names = [path.stem.rpartition(part)[0] for part in PARTS if part in path.stem]
    if not names:
        return arrays
    beside = [
        file
        for part in PARTS
        for file in sorted(path.parent.glob(f"{glob.escape(names[0])}{part}*.npz"))
        if file != path
    ]
    for file in beside:
        more = arrays_of(file)
        for name in more.keys() & arrays.keys():
            if not np.array_equal(more[name], arrays[name]):
                raise ImportFileError(
                    f"{name} of {path.name} and {file.name} differ; keep the files of one set only "
                    "in a folder"
                )
        arrays |= more
    return arrays


def _memorization(a: Arrays, path: Path) -> Arrays:
    labels = whole_numbers(a["tr_labels"], f"{path}: tr_labels")
    tests = whole_numbers(a.get("tt_labels", np.zeros(0)), f"{path}: tt_labels")
    N, M = len(labels), len(tests)
    if (
        len(numbers(a["tr_mem"], 1, f"{path}: tr_mem")) != N
        or not (np.abs(a["tr_mem"]) <= 1 + 1e-6).all()
    ):
        raise ImportFileError(f"{path}: tr_mem must be {N} numbers from -1 to 1")
    rows = []
    for name in a:
        if not name.startswith("infl_matrix_class"):
            continue
        k = name.removeprefix("infl_matrix_class")
        train, test = (
            _places(a, f"{side}_classidx_{k}", n, path) for side, n in (("tr", N), ("tt", M))
        )
        if not (np.abs(numbers(a[name], 2, f"{path}: {name}")) <= 1 + 1e-6).all():
            raise ImportFileError(f"{path}: {name} must be numbers from -1 to 1")
        if a[name].shape != (len(train), len(test)):
            raise ImportFileError(
                f"{path}: {name} is {a[name].shape}, its index says {(len(train), len(test))} "
                "[train, test]"
            )
        if not k.isdigit() or (labels[train] != int(k)).any() or (tests[test] != int(k)).any():
            raise ImportFileError(f"{path}: {name} is of examples whose label is not {k}")
        rows.append(_kept(a[name], train, test, a["tr_mem"]))
    if not rows and set(a) >= PAIRS:
        rows.append(_high_pairs(a, N, M, path))
    return {
        "memorization": np.clip(np.asarray(a["tr_mem"], np.float64), -1, 1),
        "y_train": labels,
        "y_test": tests,
        "train_ids": _names(a.get("tr_filenames"), "train", N),
        "test_ids": _names(a.get("tt_filenames"), "test", M),
        "named": np.array("tr_filenames" in a),
        "pairs": _strongest_first(np.concatenate(rows) if rows else np.zeros((0, 4))),
    }


def _strongest_first(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1], -pairs[:, 2]))]


def _places(a: Arrays, name: str, n: int, path: Path) -> NDArray[np.int64]:
    """Which of `n` examples the rows of a class are, each once."""
    found = whole_numbers(a.get(name, np.zeros(0)), f"{path}: {name}", n)
    if len(np.unique(found)) < len(found):
        raise ImportFileError(f"{path}: {name} names examples twice")
    return found


def _kept(
    matrix: np.ndarray,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    mem: np.ndarray,
) -> NDArray[np.float64]:
    """Rows (train, test, influence, strong): the rule's strong pairs, and the top of each test
    example."""
    rule = PairRule()
    strong = (matrix >= rule.min_influence) & (mem[train][:, None] >= rule.min_memorization)
    keep = strong.copy()
    top = np.argsort(-matrix, axis=0, kind="stable")[: rule.top]
    np.put_along_axis(keep, top, True, axis=0)
    keep &= strong | (matrix > 0)
    i, j = np.nonzero(keep)
    return np.stack([train[i], test[j], matrix[i, j], strong[i, j]], 1).astype(np.float64)


def _high_pairs(a: Arrays, N: int, M: int, path: Path) -> NDArray[np.float64]:
    """Rows as those of `_kept`, of pairs that were published by themselves. Their memorization
    says if they are of these examples, in this order."""
    pairs = _rows_of_pairs(a, N, M, path)
    wrong = int((~(np.abs(a["mem"] - a["tr_mem"][pairs[:, 0].astype(int)]) <= SAME)).sum())
    if wrong:
        raise ImportFileError(
            f"{path}: {wrong:,} of {len(pairs):,} pairs have other memorization than tr_mem has; "
            "they are of another set or order"
        )
    return pairs


def _rows_of_pairs(a: Arrays, N: int, M: int, path: Path) -> NDArray[np.float64]:
    """Rows as those of `_kept`, of a file of pairs."""
    train, test = (whole_numbers(a[name], f"{path}: {name}") for name in ("tr_idx", "tt_idx"))
    if len({len(numbers(a[name], 1, f"{path}: {name}")) for name in PAIRS}) > 1:
        raise ImportFileError(f"{path}: tr_idx, tt_idx, infl and mem have other lengths")
    for name in ("infl", "mem"):
        if not (np.abs(a[name]) <= 1 + 1e-6).all():
            raise ImportFileError(f"{path}: {name} must be numbers from -1 to 1")
    if len(train) and not (train.max() < N and test.max() < M):
        raise ImportFileError(
            f"{path}: pairs name examples beyond {N:,} training and {M:,} test examples"
        )
    rule = PairRule()
    strong = (a["infl"] >= rule.min_influence) & (a["mem"] >= rule.min_memorization)
    return np.stack([train, test, a["infl"], strong], 1).astype(np.float64)


def _pairs_alone(a: Arrays, data: Examples, path: Path) -> Arrays:
    """Pairs of the examples of `data`, in its order; memorization is NaN of those in no pair."""
    pairs = _rows_of_pairs(a, len(data.train_ids), len(data.test_ids), path)
    train, test = (pairs[:, k].astype(np.int64) for k in (0, 1))
    _check_classes(data, train, test, path)
    memorization = np.full(len(data.train_ids), np.nan)
    memorization[train] = np.clip(a["mem"], -1, 1)
    if not (np.abs(memorization[train] - a["mem"]) <= SAME).all():
        raise ImportFileError(f"{path}: mem of one training example differs from pair to pair")
    return {
        "memorization": memorization,
        "y_train": data.y_train,
        "y_test": data.y_test,
        "named": np.array(False),
        "pairs": _strongest_first(pairs),
    }


def _check_classes(
    data: Examples, train: NDArray[np.int64], test: NDArray[np.int64], path: Path
) -> None:
    """Raises ImportFileError unless both of every pair have one class, and are so many that this
    is no chance."""
    wrong = int((data.y_train[train] != data.y_test[test]).sum())
    if wrong:
        raise ImportFileError(
            f"{path}: the two examples of {wrong:,} of {len(train):,} pairs have different classes "
            f"in {data.name}, and published pairs have one; the pairs are of another set or order"
        )
    classes = data.y_test[np.unique(test)]
    share = np.bincount(data.y_test) / max(1, len(data.y_test))
    if np.log(share[classes]).sum() > math.log(BY_CHANCE):
        raise ImportFileError(
            f"{path} has pairs of {len(classes):,} test examples, too few to check its order by "
            "their classes; put the *_index.npz or the *_infl_matrix.npz of the same set beside it"
        )


def _consistency(a: Arrays, path: Path) -> Arrays:
    labels = whole_numbers(a["labels"], f"{path}: labels")
    N = len(labels)
    if (
        len(numbers(a["scores"], 1, f"{path}: scores")) != N
        or N == 0
        or not ((a["scores"] >= 0) & (a["scores"] <= 1)).all()
    ):
        raise ImportFileError(f"{path}: scores must be {N} numbers from 0 to 1")
    return {
        "accuracy_out": np.asarray(a["scores"], np.float64),
        "y_train": labels,
        "y_test": np.zeros(0, np.int64),
        "train_ids": _names(a.get("filenames"), "train", N),
        "test_ids": np.zeros(0, "U1"),
        "named": np.array("filenames" in a),
        "pairs": np.zeros((0, 4)),
    }


def _names(values: np.ndarray | None, split: str, n: int) -> np.ndarray:
    if values is None:
        return np.array([f"{split}-{k:05d}" for k in range(n)], dtype=str)
    return np.array([example_id(as_text(value)) for value in values], dtype=str)


def _joined(found: Arrays, data: Examples) -> Arrays:
    """The arrays in the order of `data`."""
    out, places = dict(found), {}
    for split, own in (("train", data.train_ids), ("test", data.test_ids)):
        labels = found[f"y_{split}"]
        if len(labels) == 0:
            continue
        names = list(found[f"{split}_ids"]) if found["named"] else []
        order = order_in(data, split, len(labels), names, labels)
        out[f"y_{split}"], out[f"{split}_ids"] = labels[order], np.array(own)
        places[split] = np.argsort(order)
        for name in ("memorization", "accuracy_out"):
            if split == "train" and name in out:
                out[name] = found[name][order]
    pairs = found["pairs"].copy()
    if len(pairs):
        pairs[:, 0] = places["train"][pairs[:, 0].astype(int)]
        pairs[:, 1] = places["test"][pairs[:, 1].astype(int)]
    n = len(out["y_train"]) + len(out["y_test"])
    hashes = np.array(data.content_hashes[:n])
    return out | {"pairs": pairs, "hashes": hashes, "classes": np.array(data.classes)}


def _write(a: Arrays, store: Store, path: Path) -> Store:
    N, M = len(a["y_train"]), len(a["y_test"])
    value = a.get("memorization", a.get("accuracy_out"))
    assert value is not None
    store, index = make_study(
        a,
        store,
        sizes=(N, M),
        name=path.stem,
        plan=Plan(n=N, kind="published"),
        model="published scores",
        outcomes=hashlib.sha256(value.tobytes() + a["pairs"].tobytes()).hexdigest(),
    )
    ids = index["example_id"].to_pylist()
    of = columns.SCORES_EXAMPLES
    values: dict[str, object] = {
        "epsilon": np.full(N + M, math.inf),
        "null_reason": _why_null(a, N, M),
        **{
            name: pa.array(np.concatenate([a[name], np.full(M, np.nan)]), from_pandas=True)
            for name in ("memorization", "accuracy_out")
            if name in a
        },
    }
    arrays = {
        name: index[name] if name in index.column_names else values.get(name, pa.nulls(N + M))
        for name in of
    }
    table = pa.Table.from_pydict(arrays).cast(columns.schema(of))
    about = {"study_hash": store.study().hash, "summary": {}}
    store.write_scores("examples", table, about)
    empty = columns.schema(columns.SCORES_TRIALS).empty_table()
    store.write_scores("trials", empty, about)
    store.write_scores("influence", _pair_table(a, ids, N), about)
    return store


def _why_null(a: Arrays, N: int, M: int) -> pa.Array:
    known = np.isfinite(a.get("memorization", np.full(N, np.nan)))
    reasons = [None if k else "not published" for k in known.tolist()]
    return pa.array([*reasons, *["test example"] * M], pa.string())


def _pair_table(a: Arrays, ids: list[str], N: int) -> pa.Table:
    train, test = (a["pairs"][:, k].astype(np.int64) for k in (0, 1))
    values = {
        "train_id": [ids[k] for k in train],
        "test_id": [ids[N + k] for k in test],
        "train_index": train,
        "test_index": test,
        "train_label": a["y_train"][train],
        "test_label": a["y_test"][test] if len(test) else np.zeros(0, np.int64),
        "epsilon": np.full(len(train), math.inf),
        "influence": a["pairs"][:, 2],
        "memorization": a["memorization"][train] if "memorization" in a else np.zeros(0),
        "strong": a["pairs"][:, 3].astype(bool),
    }
    of = columns.INFLUENCE
    arrays = {name: values.get(name, pa.nulls(len(train))) for name in of}
    return pa.Table.from_pydict(arrays).cast(columns.schema(of))
