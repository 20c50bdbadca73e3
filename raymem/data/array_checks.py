"""Arrays as people have them -> uint8 images and int64 labels, or a refusal that names the ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raymem.errors import ExamplesError, RaymemError

SHOWN = 5


def as_images(x: ArrayLike, ids: Sequence[str]) -> NDArray[np.uint8]:
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ExamplesError(f"images have different shapes ({error}); resize them") from error
    if x.dtype == object:
        raise ExamplesError("images are an object array; stack them into one uint8 array")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise ExamplesError(f"images must be [N, H, W, C] or [N, H, W], got shape {x.shape}")
    if x.shape[3] not in (1, 2, 3, 4):
        hint = "; it looks like [N, C, H, W]: transpose(0, 2, 3, 1)" if x.shape[1] in (1, 3) else ""
        raise ExamplesError(f"images have {x.shape[3]} channels, at most 4 are images{hint}")
    if x.dtype != np.uint8:
        x = _eight_bit(x, ids)
    return np.ascontiguousarray(x)


def _eight_bit(x: np.ndarray, ids: Sequence[str]) -> NDArray[np.uint8]:
    def refuse(bad: NDArray[np.bool_], what: str) -> None:
        rows = np.flatnonzero(bad.reshape(len(x), -1).any(axis=1)).tolist()
        if len(rows):
            raise ExamplesError(f"{len(rows)} images {what}: {some(ids[r] for r in rows)}")

    if np.issubdtype(x.dtype, np.integer):
        refuse((x < 0) | (x > 255), "have values outside 0..255")
        return x.astype(np.uint8)
    if not np.issubdtype(x.dtype, np.floating):
        raise ExamplesError(f"images have dtype {x.dtype}; give uint8")
    refuse(~np.isfinite(x), "have NaN or infinite pixels")
    refuse((x < 0) | (x > 1), "have floats outside [0, 1] (for 0..255, cast to uint8)")
    scaled = np.round(x * 255)
    refuse(abs(x * 255 - scaled) > 0.01, "are not 8-bit images (normalized?); give uint8 pixels")
    return scaled.astype(np.uint8)


def as_labels(y: ArrayLike, ids: Sequence[str]) -> NDArray[np.int64]:
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ExamplesError(
            f"labels have shape {y.shape}; give one class number per image, not soft or one-hot"
        )
    if not np.issubdtype(y.dtype, np.integer):
        bad = [i for i, label in enumerate(y.tolist()) if label is None or label != label]
        missing = f"; missing at {some(ids[i] for i in bad)}" if bad else ""
        raise ExamplesError(f"labels have dtype {y.dtype}; give class numbers 0..K-1{missing}")
    negative = np.flatnonzero(y < 0).tolist()
    if negative:
        raise ExamplesError(
            f"{len(negative)} labels are negative: "
            + some(f"{ids[i]} has {y[i]}" for i in negative)
        )
    return np.ascontiguousarray(y, np.int64)


def numbered_ids(split: str, n: int) -> tuple[str, ...]:
    width = max(5, len(str(n - 1)))
    return tuple(f"{split}-{i:0{width}d}" for i in range(n))


def repeated_ids(ids: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [id_ for id_ in ids if id_ in seen or seen.add(id_)]  # type: ignore[func-returns-value]


def encodable(text: str) -> bool:
    """Can `text` be encoded as UTF-8? File names need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def some(items: Iterable[object]) -> str:
    shown = [str(item) for item in items]
    more = f" and {len(shown) - SHOWN:,} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def arrays_of_npz(path: Path, error: type[RaymemError]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled objects are never loaded. Raises `error`."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError as cause:
        raise error(f"there is no file {path}; give the path of an .npz file") from cause
    except Exception as cause:  # errors of zip, npy header and pickle all mean the same to the user
        raise error(
            f"{path} cannot be read ({cause}); write it with numpy.savez, without object arrays"
        ) from cause
