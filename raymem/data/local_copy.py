"""The pixels of a cache on this node's disk: copied once, checked, mapped by every process.

One .npy file per split, uint8 [n, H, W, C] in the order of the index: the same bytes whatever the
pieces are. It is written under a temporary name by whoever holds the folder's lock, and renamed
when it is whole.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.data.pixels import content_hash
from raymem.errors import DamagedObjectError, StoreFullError, first_line

READERS = 8
# Smaller copies are too quick to need a progress line.
LARGE_BYTES, LOG_SECONDS = 2_000_000_000, 30.0
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where the images of one split are, in the order of the index."""

    name: str
    """train or test: the name of its file."""
    pieces: pa.ChunkedArray
    """Key of the piece of each image."""
    rows: pa.ChunkedArray
    """Row of each image in its piece."""
    hashes: pa.ChunkedArray
    """Content hash of each image."""


def copied(
    fetch: Callable[[str], bytes],
    splits: Sequence[Split],
    image_shape: Shape,
    folder: Path,
    url: str,
) -> list[NDArray[np.uint8]]:
    """The pixels of the splits of the cache at `url`, mapped from `folder`, copied if need be.

    `fetch` reads a piece by its key. Raises DamagedObjectError and StoreFullError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not all(_is_whole(folder, split, image_shape) for split in splits):
        with _locked(folder):
            # An earlier holder of the lock may have copied it, or died and left a part.
            for left in folder.glob("*.part"):
                left.unlink()
            missing = [s for s in splits if not _is_whole(folder, s, image_shape)]
            _check_space(folder, missing, image_shape)
            total = sum(len(split.rows) for split in missing) * int(np.prod(image_shape))
            with _Progress(total, folder) as progress:
                for split in missing:
                    _copy(fetch, split, image_shape, folder, url, progress)
    return [np.load(_file(folder, split), mmap_mode="r") for split in splits]


def npy_header(n: int, image_shape: Shape) -> bytes:
    """The header of an .npy file of n images, as NumPy writes it.

    >>> len(npy_header(1, (8, 8, 3))), len(npy_header(10**9, (8, 8, 3)))
    (128, 128)
    """
    buffer = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (n, *image_shape)}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def images_of(data: bytes) -> NDArray[np.uint8]:
    """The images of a piece, uint8 [rows, H, W, C], without a copy. Raises ValueError."""
    file = io.BytesIO(data[:1024])
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"its .npy version is {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or len(shape) != 4:
        raise ValueError(f"it holds {dtype} of shape {shape}")
    return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape)


def damaged(url: str, piece: str, why: str) -> DamagedObjectError:
    """The error for a piece that differs from its shard's record."""
    shard = piece.replace("pieces/", "shards/", 1).rpartition("-")[0]
    return DamagedObjectError(
        f"{url}/{piece} is damaged ({why}); delete it, {shard}.parquet and cache.json there, and "
        "ingest again: only this shard is decoded anew"
    )


def _file(folder: Path, split: Split) -> Path:
    return folder / f"{split.name}.npy"


def _length(split: Split, image_shape: Shape) -> int:
    return len(npy_header(0, image_shape)) + len(split.rows) * int(np.prod(image_shape))


def _is_whole(folder: Path, split: Split, image_shape: Shape) -> bool:
    try:
        return _file(folder, split).stat().st_size == _length(split, image_shape)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this node at a time; the system frees the lock when its holder dies."""
    import fcntl  # Windows has none, and everything else runs there

    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(folder: Path, splits: Sequence[Split], image_shape: Shape) -> None:
    needed = sum(_length(split, image_shape) for split in splits)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _full(folder, f"{needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free")


def _full(folder: Path, why: str) -> StoreFullError:
    return StoreFullError(
        f"the cache does not fit into {folder} ({why}); free some, or let RAYMEM_CACHE_DIR name a "
        "folder on a larger disk"
    )


def _copy(
    fetch: Callable[[str], bytes],
    split: Split,
    image_shape: Shape,
    folder: Path,
    url: str,
    progress: _Progress,
) -> None:
    temporary = folder / f"{split.name}.part"
    header, each = npy_header(len(split.rows), image_shape), int(np.prod(image_shape))
    rows, hashes = split.rows.to_numpy(), split.hashes
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            file.flush()
            file.truncate(_length(split, image_shape))

            def place(piece: str, at: NDArray[np.int64]) -> None:
                images = _images(fetch, piece, image_shape, url)
                for index, digest in zip(at.tolist(), hashes.take(at).to_pylist(), strict=True):
                    row = int(rows[index])
                    if row >= len(images) or content_hash(images[row]) != digest:
                        raise damaged(url, piece, f"row {row} is not the image it was")
                    os.pwrite(file.fileno(), images[row].data, len(header) + index * each)
                progress.add(len(at) * each)

            _in_threads(place, _by_piece(split))
            os.fsync(file.fileno())
        os.replace(temporary, _file(folder, split))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(folder, first_line(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _images(
    fetch: Callable[[str], bytes], piece: str, image_shape: Shape, url: str
) -> NDArray[np.uint8]:
    try:
        images = images_of(fetch(piece))
    except FileNotFoundError as error:
        raise damaged(url, piece, "it is not there") from error
    except ValueError as error:
        raise damaged(url, piece, first_line(error)) from error
    if images.shape[1:] != image_shape:
        raise damaged(url, piece, f"its images are {images.shape[1:]}")
    return images


def _by_piece(split: Split) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Each piece, and the positions in the split of its images."""
    encoded = split.pieces.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    for number, piece in enumerate(encoded.dictionary.to_pylist()):
        yield piece, order[edges[number] : edges[number + 1]]


def _in_threads(
    place: Callable[[str, NDArray[np.int64]], None],
    work: Iterator[tuple[str, NDArray[np.int64]]],
) -> None:
    """Do all of the work; the first error ends it."""
    with ThreadPoolExecutor(READERS) as pool:
        futures = [pool.submit(place, piece, at) for piece, at in work]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Progress:
    """Progress of large copies on stderr: one line, rewritten, or a line every 30 s in a log."""

    def __init__(self, total: int, folder: Path) -> None:
        self.total, self.folder, self.done = total, folder, 0
        self._lock, self._start = threading.Lock(), time.monotonic()
        self._last = self._start
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        if self.total >= LARGE_BYTES:
            print(
                f"copying {self.total / 1e9:,.1f} GB of pixels to {self.folder}, once per node",
                file=sys.stderr,
                flush=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.total >= LARGE_BYTES and self._terminal:
            print(file=sys.stderr, flush=True)

    def add(self, n: int) -> None:
        """Count bytes that were copied."""
        with self._lock:
            self.done += n
            now = time.monotonic()
            often = 0.5 if self._terminal else LOG_SECONDS
            if self.total < LARGE_BYTES or (now - self._last < often and self.done < self.total):
                return
            self._last = now
            rate = self.done / max(now - self._start, 1e-9)
            text = f"copied {self.done / 1e9:,.1f} of {self.total / 1e9:,.1f} GB, "
            text += f"{rate / 1e6:,.0f} MB/s, {(self.total - self.done) / rate:,.0f} s left"
            start, end = ("\r\033[K", "") if self._terminal else ("", "\n")
            print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
