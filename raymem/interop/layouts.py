"""Published layouts of fleets -> the arrays that `import_arrays` takes.

npz          an .npz file with those arrays
fz           Feldman & Zhang's training runs: RATIO/RUN/aux_arrays.npz
datamodels   masks.npy, train_margins.npy (and test_margins.npy), _completed.npy, or the published
             train_masks_50pct.npy, train_margins_50pct.npy, test_margins_50pct.npy (Ilyas et al.
             2022)
lira         a folder for each model: keep.npy, scores.npy, logits or correct.npy (Carlini et
             al. 2022)

Shapes: T trials, N training and M test examples, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from raymem.errors import ImportFileError
from raymem.interop.crosswalk import labels_in
from raymem.interop.safe import array_of, arrays_of, mapped, numbers, truths_in, whole_numbers

Arrays = dict[str, np.ndarray]
AUX = "aux_arrays.npz"
PER_TRIAL = ("masks", "correct_train", "correct_test", "margins_train", "margins_test")
SHOWN = 5
ROWS_AT_ONCE = 256


def read_npz(path: Path, labels: NDArray[np.int64] | None, trials: int | None) -> Arrays:
    """An .npz file of masks [T, N], correct_train [T, N] and what else there is."""
    arrays = arrays_of(path)
    if "correct" in arrays and "correct_train" not in arrays:
        arrays["correct_train"] = arrays.pop("correct")
    return {name: a[:trials] if name in PER_TRIAL and a.ndim else a for name, a in arrays.items()}


def read_fz(path: Path, labels: NDArray[np.int64] | None, trials: int | None) -> Arrays:
    """Runs of Feldman & Zhang: `correctness_{train,removed,test}` are scattered to where
    `index_{train,removed,test}` say. Runs of one subset ratio only."""
    runs = sorted(path.rglob(AUX), key=lambda p: _natural(p.parent))
    if not runs:
        raise ImportFileError(f"{path} has no {AUX} in it; give the folder above the runs")
    ratios = {run.parent.parent for run in runs}
    if len(ratios) > 1:
        raise ImportFileError(
            f"{path} has runs of {len(ratios)} subset ratios "
            f"({', '.join(sorted(p.name for p in ratios)[:SHOWN])}); import one of the folders"
        )
    runs = runs[:trials]
    masks: list[NDArray[np.bool_]] = []
    train: list[NDArray[np.bool_]] = []
    test: list[NDArray[np.bool_]] = []
    for run in runs:
        a = arrays_of(run)
        absent = [
            f"{what}_{part}"
            for what in ("correctness", "index")
            for part in ("train", "removed", "test")
            if f"{what}_{part}" not in a
        ]
        if absent:
            raise ImportFileError(f"{run} lacks {', '.join(absent)}; it is no run of this layout")
        index = {
            part: whole_numbers(a[f"index_{part}"], f"{run}: index_{part}")
            for part in ("train", "removed", "test")
        }
        inside, removed = index["train"], index["removed"]
        N, M = len(inside) + len(removed), len(index["test"])
        both = np.concatenate([inside, removed])
        if not np.array_equal(np.sort(both), np.arange(N)):
            raise ImportFileError(
                f"{run}: index_train and index_removed are not each of 0..{N - 1} once; the run is "
                "not whole"
            )
        if not np.array_equal(np.sort(index["test"]), np.arange(M)):
            raise ImportFileError(f"{run}: index_test is not each of 0..{M - 1} once")
        if "subsample_idx" in a and not np.array_equal(
            np.sort(a["subsample_idx"]), np.sort(inside)
        ):
            raise ImportFileError(f"{run}: subsample_idx is not index_train; which was trained on?")
        if masks and (len(masks[0]), len(test[0])) != (N, M):
            raise ImportFileError(f"{run} has {N} and {M} examples, other runs have not")
        right = {part: _outcomes(a, part, len(index[part]), run) for part in index}
        masks.append(_scattered(inside, np.ones(len(inside), bool), N))
        train.append(_scattered(both, np.concatenate([right["train"], right["removed"]]), N))
        test.append(_scattered(index["test"], right["test"], M))
    return {
        "masks": np.array(masks),
        "correct_train": np.array(train),
        "correct_test": np.array(test),
    }


def _outcomes(a: Arrays, part: str, n: int, run: Path) -> NDArray[np.bool_]:
    values = numbers(a[f"correctness_{part}"], 1, f"{run}: correctness_{part}")
    if not np.isin(values, (0, 1)).all() or len(values) != n:
        raise ImportFileError(
            f"{run}: correctness_{part} must be 0 or 1, one for each of the {n} in index_{part}"
        )
    return values.astype(bool)


def _scattered(index: np.ndarray, values: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    out = np.zeros(n, bool)
    out[index] = values
    return out


def read_datamodels(path: Path, labels: NDArray[np.int64] | None, trials: int | None) -> Arrays:
    """Right is a margin above 0 (the label's logit minus the largest other one, which is not the
    margin that raymem keeps: only outcomes are taken). Models not completed are left out.

    A folder with masks.npy, or with the published train_masks_50pct.npy; if it has those of several
    shares, `path` is the masks' file of one. Only the models that are taken are read.
    """
    masks_path = _masks_of(path)
    folder, share = masks_path.parent, masks_path.stem.removeprefix("train_").removeprefix("masks")
    masks = mapped(masks_path)
    if masks.ndim != 2:
        raise ImportFileError(f"{masks_path} is {masks.shape}; masks are [models, train examples]")
    done = np.arange(len(masks))
    if (folder / "_completed.npy").exists():
        completed = truths_in(folder / "_completed.npy")
        if completed.shape != done.shape:
            raise ImportFileError(
                f"{folder / '_completed.npy'} is {completed.shape}, but there are {len(done)} masks"
            )
        done = np.flatnonzero(completed)
    done = done[:trials]
    train, test = folder / f"train_margins{share}.npy", folder / f"test_margins{share}.npy"
    plain = folder / "margins.npy"
    if not train.exists() and plain.exists() and mapped(plain).shape[1:] == masks.shape[1:]:
        train = plain
    if not train.exists():
        raise ImportFileError(
            f"{folder} has no {train.name}: memorization is of training examples, and needs their "
            "margins"
        )
    margins = {"correct_train": numbers(mapped(train), 2, str(train))}
    if test.exists():
        margins["correct_test"] = numbers(mapped(test), 2, str(test))
    width = masks.shape[1] + sum(m.shape[-1] for m in margins.values())
    _check_room(len(done) * width, masks_path)
    return {
        "masks": np.array(masks[done]),
        **{name: _right(m, done, len(masks), folder) for name, m in margins.items()},
    }


def _masks_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / "masks.npy", *sorted(path.glob("train_masks*.npy"))]
    found = [file for file in found if file.exists()]
    if len(found) != 1:
        several = f" ({', '.join(file.name for file in found[:SHOWN])}); give one of them as PATH"
        raise ImportFileError(
            f"{path} has {len(found)} files of masks"
            + (several if found else "; the published ones are train_masks_50pct.npy and the like")
        )
    return found[0]


def _right(
    margins: np.ndarray, done: NDArray[np.int64], models: int, folder: Path
) -> NDArray[np.bool_]:
    """Which outcomes of the models `done` are right; read some models at a time."""
    if margins.ndim != 2 or len(margins) != models:
        raise ImportFileError(
            f"margins in {folder} are {margins.shape}, but there are {models} masks"
        )
    right = np.empty((len(done), margins.shape[1]), bool)
    for start in range(0, len(done), ROWS_AT_ONCE):
        part = np.array(margins[done[start : start + ROWS_AT_ONCE]])
        if not np.isfinite(part).all():
            raise ImportFileError(
                f"margins in {folder} that are not finite, of completed models; copy them again, "
                "or mark those models in _completed.npy"
            )
        right[start : start + ROWS_AT_ONCE] = part > 0
    return right


def _check_room(outcomes: int, path: Path) -> None:
    """Raises ImportFileError if the outcomes, a byte each, do not fit in memory twice."""
    needed, there = 2 * outcomes, psutil.virtual_memory().available
    if needed > there:
        raise ImportFileError(
            f"{path} and its margins need {needed / 1e9:.0f} GB of memory, {there / 1e9:.0f} GB "
            "are free; take the first models only, with --trials 10000"
        )


def read_lira(path: Path, labels: NDArray[np.int64] | None, trials: int | None) -> Arrays:
    """keep [N]; logits [N, K] or [N, queries, K], of which the first query counts; scores likewise.
    y_train.npy [N] beside the models' folders has the labels in their order.

    Labels are the fleet's (`y_train` of what is returned) if they are from y_train.npy, or if with
    `labels` the logits of all models give the scores. Without logits correct.npy [N] says what was
    right.
    """
    keeps = sorted(path.rglob("keep.npy"), key=lambda p: _natural(p.parent))
    if not keeps:
        raise ImportFileError(
            f"{path} contains no keep.npy; give the folder that contains the folders of the models"
        )
    _check_keeps(path, {keep.parent for keep in keeps})
    own = path / "y_train.npy"
    known = own.exists()
    labels = labels_in(own) if known else labels
    masks, correct, margins, compared = [], [], [], []
    for keep in keeps[:trials]:
        mask = truths_in(keep)
        logits, scores = _lira_file(keep.parent, "logits"), _lira_file(keep.parent, "scores")
        right = keep.parent / "correct.npy"
        if logits is None and not right.exists():
            raise ImportFileError(
                f"{keep.parent} has neither logits nor correct.npy: a score below 0 does not say "
                "if the model was right"
            )
        found = None if scores is None else _first_query(array_of(scores), 1)
        if found is not None:
            _check_length(len(numbers(found, 1, str(scores))), len(mask), str(scores))
        if logits is not None:
            if labels is None:
                raise ImportFileError(
                    f"{path} has logits but no y_train.npy; give --data, or --labels, in its order"
                )
            z = numbers(_first_query(array_of(logits), 2), 2, str(logits)).astype(np.float64)
            _check_length(len(z), len(mask), str(logits))
            _check_length(len(labels), len(mask), "the labels")
            whole_numbers(labels, f"{logits} has {z.shape[1]} classes; the labels", z.shape[1])
            hits, margin = _margins(z, labels)
            compared.append(_check_scores(found, margin, logits))
            found = margin
        else:
            hits = truths_in(right)
        _check_length(len(hits), len(mask), str(right))
        masks.append(mask)
        correct.append(hits)
        if found is not None:
            margins.append(found)
    arrays: Arrays = {"masks": np.array(masks), "correct_train": np.array(correct)}
    if len(margins) == len(masks):
        arrays["margins_train"] = np.array(margins, np.float32)
    if labels is not None and (known or (len(compared) == len(masks) and all(compared))):
        arrays["y_train"] = labels
    return arrays


def _check_keeps(path: Path, folders: set[Path]) -> None:
    """Raises ImportFileError unless every model has a keep.npy of the same length."""
    lost = sorted(
        {file.parent for name in ("scores.npy", "correct.npy", "logits.npy")
         for file in path.rglob(name)} - folders
    )  # fmt: skip
    if lost:
        raise ImportFileError(
            f"{lost[0]} has no keep.npy: nothing says what that model was trained on; copy it "
            "again, or move the folder away"
        )
    sizes = {mapped(folder / "keep.npy").shape for folder in folders}
    if len(sizes) > 1:
        some = ", ".join(str(size) for size in sorted(sizes)[:SHOWN])
        raise ImportFileError(f"keep.npy of the models in {path} differ in size: {some}")


def _lira_file(folder: Path, name: str) -> Path | None:
    """NAME.npy, or the last epoch's of the folder NAME."""
    if (folder / f"{name}.npy").exists():
        return folder / f"{name}.npy"
    epochs = sorted((folder / name).glob("*.npy"))
    return epochs[-1] if epochs else None


def _first_query(array: np.ndarray, ndim: int) -> np.ndarray:
    while array.ndim > ndim:
        array = array[:, 0]
    return array


def _margins(
    logits: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Right [N], and log p_y - log of the sum of the others [N]."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    top = others.max(1)
    rest = top + np.log(np.exp(others - top[:, None]).sum(1))
    return logits.argmax(1) == labels, logits[rows, labels] - rest


def _check_scores(scores: np.ndarray | None, own: NDArray[np.float64], path: Path) -> bool:
    """Are scores what these labels give? Published code adds a small number inside the logarithm,
    so that only scores near 0 are compared. False if there is none to compare."""
    if scores is None:
        return False
    near = (np.abs(own) < 8) & (np.abs(scores) < 8)
    agree = np.abs(scores - own)[near] < 0.05
    if near.any() and agree.mean() < 0.99:
        raise ImportFileError(
            f"{path}: with these labels {100 * (1 - agree.mean()):.0f}% of the scores are not "
            "those of the logits; the order of the labels is another one"
        )
    return bool(near.any())


def _check_length(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ImportFileError(f"{what} has {found} examples, but there are {wanted} in keep.npy")


def _natural(path: Path) -> list[int | str]:
    """Sort key: 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


# Of a path, labels if they are known, and how many of the first models are wanted (None: all).
FORMATS: dict[str, Callable[[Path, NDArray[np.int64] | None, int | None], Arrays]] = {
    "npz": read_npz,
    "fz": read_fz,
    "datamodels": read_datamodels,
    "lira": read_lira,
}
