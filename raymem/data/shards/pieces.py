"""Pieces of a cache: pixels of a shard's images, written as decoded, and read back as records.

A piece is pieces/SPLIT/SHARD-000.npy, uint8 [rows, H, W, C]; shards/SPLIT/SHARD.parquet says which
image each row is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.data.cache import Cache, pieces_in_order
from raymem.data.local_copy import damaged, images_of, npy_header
from raymem.data.pixels import content_hash
from raymem.data.shards.records import Record, Shard
from raymem.errors import DamagedObjectError
from raymem.store import Files
from raymem.store.trials import decode

# A whole piece is in memory while it is written or read.
PIECE_BYTES = 128 << 20


def shard_key(split: str, name: str) -> str:
    """Key of a shard's records in a cache."""
    return f"shards/{split}/{name}.parquet"


class PieceWriter:
    """Writes the pixels of one shard, in order, into pieces of at most `PIECE_BYTES`."""

    def __init__(
        self, files: Files, split: str, name: str, image_shape: tuple[int, int, int]
    ) -> None:
        self.files, self.stem, self.shape = files, f"pieces/{split}/{name}", image_shape
        self.most = max(1, PIECE_BYTES // int(np.prod(image_shape)))
        self.number, self.rows = 0, 0
        self._buffer = io.BytesIO()

    @property
    def key(self) -> str:
        """Key of the piece that is being written."""
        return f"{self.stem}-{self.number:03d}.npy"

    def add(self, pixels: NDArray[np.uint8]) -> tuple[str, int]:
        """Take an image; returns its piece and row."""
        if self.rows == self.most:
            self.flush()
            self.number += 1
        if self.rows == 0:
            self._buffer.write(npy_header(0, self.shape))
        self._buffer.write(np.ascontiguousarray(pixels).data)
        self.rows += 1
        return self.key, self.rows - 1

    def flush(self) -> None:
        """Write the piece, replacing what a killed run may have left."""
        if self.rows == 0:
            return
        self._buffer.seek(0)
        # The header has the same length as the one for no rows, which it replaces.
        self._buffer.write(npy_header(self.rows, self.shape))
        self.files.replace(self.key, self._buffer.getvalue())
        self._buffer, self.rows = io.BytesIO(), 0


def list_pieces(url: str) -> list[Shard]:
    """The pieces of a finished cache as shards, train first. Raises ExamplesError."""
    cache = Cache(url)
    return [
        Shard(
            url=f"{cache.url}/{piece}",
            name=piece.removeprefix("pieces/").removesuffix(".npy"),
            kind="cache",
            root=cache.url,
        )
        for piece in pieces_in_order(cache.index())
    ]


def read_piece(shard: Shard) -> Iterator[Record]:
    """The examples in a piece, in the order of its rows, decoded. Raises DamagedObjectError."""
    cache, files = Cache(shard.root), Files(shard.root)
    piece = f"pieces/{shard.name}.npy"
    split, _, name = shard.name.rpartition("-")[0].partition("/")
    rows = shard_rows(files, shard_key(split, name))
    try:
        images = images_of(files.read(piece))
    except (FileNotFoundError, ValueError) as error:
        raise damaged(cache.url, piece, str(error)) from error
    for row in rows.to_pylist():
        label = row["label"]
        if (
            row["piece"] != piece
            or label is None
            or label not in range(len(cache.about["classes"]))
        ):
            continue
        at = row["row"]
        if at >= len(images) or content_hash(images[at]) != row["content_hash"]:
            raise damaged(cache.url, piece, f"row {at} is not the image it was")
        yield Record(example_id=row["example_id"], label=label, data=b"", pixels=images[at])


def shard_rows(files: Files, key: str) -> pa.Table:
    """The records of a shard, one row each. Raises DamagedObjectError."""
    try:
        return decode(files.read(key), key)
    except (DamagedObjectError, FileNotFoundError) as error:
        raise DamagedObjectError(
            f"{files.url}/{key} does not read back; delete it, and cache.json if it is there, and "
            "ingest again: only this shard is decoded anew"
        ) from error
