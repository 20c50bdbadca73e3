"""A store -> files that other people's code reads.

npz    the fleet's arrays, as `raymem import npz` takes them
fz     Feldman & Zhang's training runs (RATIO/RUN/aux_arrays.npz), and their list of pairs
lira   a folder for each model: keep.npy, scores.npy, correct.npy (Carlini et al. 2022)
csv    the score tables
hf     a folder for Hugging Face: the Parquet and a card with pictures that says how to load it
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.csv import write_csv

from raymem.encoding import epsilon_name
from raymem.errors import ImportFileError, StoreError
from raymem.interop.card import write_card
from raymem.store import Store, TrialKey

TABLES = ("examples", "trials", "influence")


def export(
    format: str,
    store: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    epsilon: float = math.inf,
    pictures: bool = True,
) -> Path:
    """Write a store in one of EXPORTS to `path`, a folder (for npz: a file) that must not be there.

    Fleets are those of one `epsilon`. The file or folder appears when it is whole. The card of hf
    has the report's figures and, if `pictures`, its pictures of the most memorized examples; both
    are there after `raymem report`.

    Raises StoreError if the store lacks what is exported, ImportFileError if `path` is there.
    """
    if format not in EXPORTS:
        raise ImportFileError(f"no format {format!r}; take one of {', '.join(EXPORTS)}")
    target = Path(path)
    if target.exists():
        raise ImportFileError(f"{target} is there already; choose another PATH, or remove it")
    partial = target.with_name(f".{target.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    EXPORTS[format](Store(store), partial, epsilon)
    if format == "hf":
        write_card(Store(store), partial, TABLES, pictures=pictures)
    partial.rename(target)
    return target


def _keys(store: Store, epsilon: float) -> list[TrialKey]:
    keys = sorted(key for key in store.done() if key.epsilon == epsilon)
    if not keys:
        known = sorted({key.epsilon for key in store.done()})
        raise StoreError(
            f"{store.url} has no trials at epsilon {epsilon_name(epsilon)}; there are "
            f"{', '.join(map(epsilon_name, known)) or 'none'}: see --epsilon"
        )
    return keys


def _split(store: Store) -> dict[str, pa.Table]:
    index = store.examples()
    return {s: index.filter(pc.equal(index["split"], s)) for s in ("train", "test")}


def _trial(store: Store, key: TrialKey, N: int) -> dict[str, np.ndarray]:
    """The columns of the index, by split."""
    table = store.trial(key, ["in_subset", "correct", "margin"])
    correct, margin = (table[name].to_numpy() for name in ("correct", "margin"))
    return {
        "mask": table["in_subset"].to_numpy()[:N].astype(bool),
        "correct_train": correct[:N].astype(bool), "correct_test": correct[N:].astype(bool),
        "margins_train": margin[:N].astype(np.float32),
        "margins_test": margin[N:].astype(np.float32),
    }  # fmt: skip


def _labels(table: pa.Table) -> NDArray[np.int64] | None:
    return None if table["label"].null_count else table["label"].to_numpy().astype(np.int64)


def _npz(store: Store, path: Path, epsilon: float) -> None:
    split = _split(store)
    N = split["train"].num_rows
    found = [_trial(store, key, N) for key in _keys(store, epsilon)]
    arrays: dict[str, Any] = {"masks": np.array([t["mask"] for t in found])}
    for name in ("correct_train", "correct_test", "margins_train", "margins_test"):
        arrays[name] = np.array([t[name] for t in found])
    if not np.isfinite(arrays["margins_train"]).all():
        del arrays["margins_train"], arrays["margins_test"]
    for name, table in split.items():
        if table.num_rows and (labels := _labels(table)) is not None:
            arrays[f"y_{name}"] = labels
        arrays[f"{name}_ids"] = np.array(table["example_id"].to_pylist(), dtype=str)
    arrays["classes"] = np.array(store.study().classes, dtype=str)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _fz(store: Store, path: Path, epsilon: float) -> None:
    split = _split(store)
    N, M = split["train"].num_rows, split["test"].num_rows
    ratio = path / f"{store.plan().subset_ratio:g}"
    for key in _keys(store, epsilon):
        t = _trial(store, key, N)
        inside, removed = np.flatnonzero(t["mask"]), np.flatnonzero(~t["mask"])
        run = ratio / f"{key.trial:06d}"
        run.mkdir(parents=True)
        np.savez_compressed(
            run / "aux_arrays.npz", allow_pickle=False,
            index_train=inside, index_removed=removed, index_test=np.arange(M),
            subsample_idx=inside,
            correctness_train=t["correct_train"][inside].astype(np.uint8),
            correctness_removed=t["correct_train"][removed].astype(np.uint8),
            correctness_test=t["correct_test"].astype(np.uint8),
        )  # fmt: skip
    pairs = store.scores("influence")
    pairs = pairs.filter(pc.and_(pairs["strong"], pc.equal(pairs["epsilon"], epsilon)))
    np.savez_compressed(
        path / "high_infl_pairs_infl0.15_mem0.25.npz", allow_pickle=False,
        tr_idx=pairs["train_index"].to_numpy(), tt_idx=pairs["test_index"].to_numpy(),
        infl=pairs["influence"].to_numpy(), mem=pairs["memorization"].to_numpy(),
    )  # fmt: skip
    scores = store.scores()
    here = scores.filter(
        pc.and_(pc.equal(scores["split"], "train"), pc.equal(scores["epsilon"], epsilon))
    )
    names = {f"{s}_filenames": np.array(split[full]["example_id"].to_pylist(), dtype=str)
             for s, full in (("tr", "train"), ("tt", "test"))}  # fmt: skip
    labels = {f"{s}_labels": _labels(split[full]) for s, full in (("tr", "train"), ("tt", "test"))}
    np.savez_compressed(
        path / "index.npz", allow_pickle=False,
        tr_mem=here["memorization"].cast(pa.float64()).to_numpy(),
        **names, **{k: v for k, v in labels.items() if v is not None},
    )  # fmt: skip


def _lira(store: Store, path: Path, epsilon: float) -> None:
    N = _split(store)["train"].num_rows
    for key in _keys(store, epsilon):
        t = _trial(store, key, N)
        folder = path / f"experiment_{key.trial:06d}"
        folder.mkdir(parents=True)
        np.save(folder / "keep.npy", t["mask"])
        np.save(folder / "correct.npy", t["correct_train"])
        if np.isfinite(t["margins_train"]).all():
            np.save(folder / "scores.npy", t["margins_train"].astype(np.float64))
    labels = _labels(_split(store)["train"])
    if labels is not None:
        np.save(path / "y_train.npy", labels)


def _csv(store: Store, path: Path, epsilon: float) -> None:
    path.mkdir()
    for name in TABLES:
        write_csv(store.scores(name), path / f"{name}.csv")


def _hf(store: Store, path: Path, epsilon: float) -> None:
    (path / "data").mkdir(parents=True)
    for name in TABLES:
        pq.write_table(store.scores(name), path / "data" / f"{name}.parquet", compression="zstd")


EXPORTS: dict[str, Callable[[Store, Path, float], None]] = {
    "npz": _npz,
    "fz": _fz,
    "lira": _lira,
    "csv": _csv,
    "hf": _hf,
}
