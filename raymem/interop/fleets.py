"""Arrays of a fleet trained elsewhere -> a store with one trial object per model.

What cannot be checked is refused.

Shapes: T trials, N training and M test examples.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from raymem.data import fingerprint_of, group_column
from raymem.errors import ImportFileError
from raymem.interop.safe import truths
from raymem.plan import Plan
from raymem.store import Store, StudyRecord, Target, TrialKey, columns

KEYS = (
    "masks", "correct_train", "correct_test", "margins_train", "margins_test",
    "y_train", "y_test", "train_ids", "test_ids", "classes", "hashes",
)  # fmt: skip
SHOWN = 5


def import_arrays(
    arrays: dict[str, np.ndarray],
    store: str | os.PathLike[str],
    *,
    name: str,
    path: str | os.PathLike[str],
) -> Store:
    """A store of the fleet in `arrays`; `score` it next.

    Arrays: masks bool [T, N], correct_train bool [T, N]; if you like correct_test bool [T, M],
    margins_train float [T, N] and margins_test float [T, M] (log p_y - log of the sum of the other
    classes' p; give both), y_train [N], y_test [M] (class numbers), train_ids [N], test_ids [M],
    hashes [N + M] (content hashes, train first), classes [K]. Importing the same again adds what is
    missing. `path` is what errors name.

    Raises ImportFileError naming what is wrong, StudyMismatchError if the store has another study.
    """
    check_keys(arrays, Path(path))
    _check_outcomes(arrays, Path(path))
    T, N = arrays["masks"].shape
    opened, _ = make_study(
        arrays,
        Store(store),
        sizes=(N, arrays["correct_test"].shape[1]),
        name=name,
        plan=Plan(n=N, subset_ratio=round(float(arrays["masks"].mean()), 4), kind="imported"),
        model="imported",
        outcomes=_digest(arrays),
    )
    opened.target = Target(trials=T)
    about = {
        "study_hash": opened.study().hash,
        "attempt": 1,
        "seeds": {},
        "seconds": 0.0,
        "device": "imported",
        "arithmetic": "imported",
        "host": "",
    }
    done = opened.done()
    for trial in range(T):
        key = TrialKey(math.inf, trial)
        if key not in done:
            opened.commit(key, _trial_table(arrays, trial), about)
    return opened


def make_study(
    arrays: dict[str, np.ndarray],
    store: Store,
    *,
    sizes: tuple[int, int],
    name: str,
    plan: Plan,
    model: str,
    outcomes: str,
) -> tuple[Store, pa.Table]:
    """The store with the study of what is imported, and its index, of `sizes` (N, M) examples.

    `arrays` may have labels, ids, hashes and classes, see `import_arrays`; `outcomes` is a digest
    of all else, which makes the study's identity. Raises what `import_arrays` does.
    """
    N, M = sizes
    classes, index = _classes(arrays), _index(arrays, N, M)
    identity = {
        "data": {
            "fingerprint": fingerprint_of(index, (0, 0, 0), classes),
            "image_shape": [0, 0, 0],
            "n_train": N,
            "n_test": M,
        },
        "plan": plan.as_dict(),
        "recipe": {"model": {"name": model}},
        "outcomes": outcomes,
    }
    record = StudyRecord.create(identity, data_name=name, classes=classes)
    store.import_study(record, index)
    return store, index


def check_keys(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Raises ImportFileError for arrays that are missing, or that nobody knows."""
    unknown = [key for key in arrays if key not in KEYS]
    missing = [key for key in ("masks", "correct_train") if key not in arrays]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}"
        raise ImportFileError(f"{path} {what}; a fleet's arrays are {', '.join(KEYS)}")


def _check_outcomes(arrays: dict[str, np.ndarray], path: Path) -> None:
    for name in ("masks", "correct_train", "correct_test"):
        if name in arrays:
            arrays[name] = truths(arrays[name], 2, f"{path}: {name}")
    T, N = arrays["masks"].shape
    arrays.setdefault("correct_test", np.zeros((T, 0), bool))
    M = arrays["correct_test"].shape[1]
    given = ["margins_train" in arrays, "margins_test" in arrays]
    if any(given) and not all(given) and (M > 0 or not given[0]):
        raise ImportFileError(f"{path}: give margins_train and margins_test, or neither")
    if "margins_train" in arrays:
        arrays.setdefault("margins_test", np.zeros((T, 0), np.float32))
    shapes = {
        "correct_train": (T, N), "correct_test": (T, M), "margins_train": (T, N),
        "margins_test": (T, M), "y_train": (N,), "y_test": (M,), "train_ids": (N,),
        "test_ids": (M,), "hashes": (N + M,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise ImportFileError(
                f"{path}: {name} is {arrays[name].shape}, but masks [T, N] of {(T, N)} and "
                f"{M} test examples ask for {shape}"
            )
    if "hashes" in arrays and arrays["hashes"].dtype.kind not in "US":
        raise ImportFileError(f"{path}: hashes are {arrays['hashes'].dtype}; they must be text")
    if T == 0 or N == 0:
        raise ImportFileError(f"{path}: masks are {(T, N)}; there is no fleet in it")
    if not arrays["masks"].any():
        raise ImportFileError(f"{path}: masks are all false; true is an example in the subset")
    _check_margins(arrays, path)


def _check_margins(arrays: dict[str, np.ndarray], path: Path) -> None:
    """A margin above 0 means the label beats all others together: then the model is right."""
    for split in ("train", "test"):
        margins, correct = arrays.get(f"margins_{split}"), arrays[f"correct_{split}"]
        if margins is None:
            continue
        if margins.dtype.kind not in "fiu":
            raise ImportFileError(f"{path}: margins_{split} must be numbers, got {margins.dtype}")
        if not (np.abs(margins) < np.finfo(np.float32).max).all():
            raise ImportFileError(f"{path}: margins_{split} has values that are not finite")
        wrong = (margins > 1e-4) & ~correct
        if "classes" in arrays:
            # The largest of K probabilities is at least 1/K.
            wrong |= (margins < -math.log(max(len(arrays["classes"]) - 1, 1)) - 1e-4) & correct
        if wrong.any():
            rows = [f"trial {t} example {i}" for t, i in np.argwhere(wrong)[:SHOWN]]
            raise ImportFileError(
                f"{path}: margins_{split} is above 0 where correct_{split} is false, or too low "
                f"where it is true ({wrong.sum()} times: {', '.join(rows)}); margins must be log "
                "p_y - log of the sum of the others, in the order of correct"
            )


def _index(arrays: dict[str, np.ndarray], N: int, M: int) -> pa.Table:
    ids = [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for name, n in (("train", N), ("test", M))
        for value in arrays.get(f"{name}_ids", [f"{name}-{i:05d}" for i in range(n)])
    ]
    odd = [repr(value) for value in ids if not value.isprintable()]
    if odd:
        raise ImportFileError(f"ids must be printable text; not so: {', '.join(odd[:SHOWN])}")
    if len(set(ids)) != len(ids):
        twice = sorted(value for value, n in Counter(ids).items() if n > 1)[:SHOWN]
        raise ImportFileError(f"ids must be unique over both splits; repeated: {', '.join(twice)}")
    labels = [
        None if values is None else int(values[i])
        for name, n in (("y_train", N), ("y_test", M))
        for values in (arrays.get(name),)
        for i in range(n)
    ]
    none = group_column([], N + M)
    return pa.table(
        {
            "split": ["train"] * N + ["test"] * M,
            "index": np.concatenate([np.arange(N), np.arange(M)]),
            "example_id": ids,
            "label": pa.array(labels, pa.int64()),
            "content_hash": pa.array(arrays.get("hashes", [None] * (N + M)), pa.string()),
            "duplicate_group": none,
            "near_duplicate_group": none,
        }
    )


def _classes(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    labels = [arrays[name] for name in ("y_train", "y_test") if name in arrays]
    for values in labels:
        if values.dtype.kind not in "iu" or (
            len(values) and not (values.min() >= 0 and values.max() < 2**31)
        ):
            raise ImportFileError("y_train and y_test must be class numbers from 0")
    K = 1 + max((int(values.max()) for values in labels if len(values)), default=-1)
    if arrays.get("classes", np.zeros(0)).ndim != 1:
        raise ImportFileError("classes must be a list of names, [K]")
    names = tuple(map(str, arrays.get("classes", range(K))))
    if len(names) < K:
        raise ImportFileError(f"classes names {len(names)} classes, but labels go up to {K - 1}")
    return names


def _digest(arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in ("masks", "correct_train", "correct_test", "margins_train", "margins_test"):
        if name in arrays:
            sha.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def _trial_table(arrays: dict[str, np.ndarray], trial: int) -> pa.Table:
    (_, N), M = arrays["masks"].shape, arrays["correct_test"].shape[1]
    is_test = np.arange(N + M) >= N
    values: dict[str, object] = {
        "trial": np.full(N + M, trial, np.int32),
        "epsilon": np.full(N + M, math.inf),
        "split": ["train"] * N + ["test"] * M,
        "index": np.concatenate([np.arange(N), np.arange(M)]),
        "in_subset": pa.array(
            np.concatenate([arrays["masks"][trial], np.zeros(M, bool)]), mask=is_test
        ),
        "correct": np.concatenate([arrays["correct_train"][trial], arrays["correct_test"][trial]]),
    }
    if "margins_train" in arrays:
        both = [arrays["margins_train"][trial], arrays["margins_test"][trial]]
        values["margin"] = np.concatenate(both).astype(np.float32)
    schema = columns.schema(columns.TRIAL)
    arrow = [values.get(f.name, pa.nulls(N + M, f.type)) for f in schema]
    return pa.Table.from_arrays(
        [pa.array(a, f.type) for a, f in zip(arrow, schema, strict=True)], schema=schema
    )
