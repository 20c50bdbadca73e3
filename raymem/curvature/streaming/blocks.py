"""Blocks of images: what is read, decoded and scored at once, whatever the size of a shard.

    Encoded   records as they are in a shard     by `read_blocks`
    Decoded   their pixels                       by `decode_block`

A block has about 64 images of one shard, fewer if they are large, in whole batches: the same ones
on any machine, so that scores have the same bits wherever they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymem.curvature import CHECKED
from raymem.data.pixels import content_hash
from raymem.data.shards.records import Record, Shard
from raymem.data.shards.shard_readers import read_shard
from raymem.data.shards.transform import LARGEST_LABEL, Transform, decode
from raymem.errors import ExamplesError

BLOCK_IMAGES, BLOCK_BYTES = 64, 1 << 24


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the images of a set are read."""

    shards: Sequence[Shard]
    transform: Transform
    n_classes: int
    batch_size: int
    """Images that are scored at once."""

    @property
    def images(self) -> int:
        """Images in a block.

        >>> def images(side, batch_size):
        ...     transform = Transform(size=(side, side))
        ...     return Reading(
        ...         shards=[], transform=transform, n_classes=2, batch_size=batch_size
        ...     ).images
        >>> images(32, 85), images(224, 8), images(1024, 8), images(224, 512)
        (85, 64, 8, 512)
        """
        wanted = min(BLOCK_IMAGES, BLOCK_BYTES // self.transform.values)
        return max(1, wanted // self.batch_size) * self.batch_size


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block is in its set."""

    shard: int
    first: int
    """Number of its first image in the shard."""
    last: bool
    """Is it the last one of the shard?"""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Images as they are in their shard."""

    place: Place
    records: Sequence[Record]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Images of a block, those that could not be decoded among them."""

    place: Place
    example_ids: Sequence[str]
    labels: NDArray[np.int64]
    """-1: none, or no class number."""
    hashes: Sequence[str]
    """Of the pixels; "" where there are none."""
    errors: Sequence[str]
    """Why there are none; "" where there are some."""
    pixels: NDArray[np.uint8]
    """[G, H, W, C] of those without an error."""

    @property
    def good(self) -> NDArray[np.intp]:
        """Rows [G] that have pixels."""
        return np.flatnonzero([not error for error in self.errors])


def read_blocks(reading: Reading, number: int) -> Iterator[Encoded]:
    """A shard block by block; an empty one is one empty block. No more than one is in memory."""
    records: list[Record] = []
    first = 0
    for record in read_shard(reading.shards[number]):
        if len(records) == reading.images:
            yield Encoded(place=Place(shard=number, first=first, last=False), records=records)
            first += len(records)
            records = []
        records.append(record)
    yield Encoded(place=Place(shard=number, first=first, last=True), records=records)


def decode_block(reading: Reading, block: Encoded) -> Decoded:
    """The pixels of a block."""
    H, W = reading.transform.size
    pixels, errors = [], []
    for record in block.records:
        found, error = decode(record, reading.transform, reading.n_classes)
        pixels.append(found)
        errors.append(error)
    good = [image for image in pixels if image is not None]
    empty = np.zeros((0, H, W, 1 if reading.transform.grey else 3), np.uint8)
    return Decoded(
        place=block.place,
        example_ids=[record.example_id for record in block.records],
        labels=np.array([_label(record.label) for record in block.records], np.int64),
        hashes=["" if image is None else content_hash(image) for image in pixels],
        errors=errors,
        pixels=np.stack(good) if good else empty,
    )


def _label(label: int | None) -> int:
    return label if label is not None and 0 <= label < LARGEST_LABEL else -1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first few images of a set that can be read: how each model is measured is chosen by
    these, on every machine."""

    pixels: NDArray[np.uint8]
    """[n, H, W, C]"""
    labels: NDArray[np.int64]
    """[n]"""


def sample_of(reading: Reading) -> Sample:
    """The first readable images. Raises ExamplesError if none has pixels and a label."""
    found: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first = ""
    for record in (record for shard in reading.shards for record in read_shard(shard)):
        pixels, error = decode(record, reading.transform, reading.n_classes)
        first = first or (error and f"; the first, {record.example_id}: {error}")
        if pixels is not None:
            found.append(pixels)
            labels.append(_label(record.label))
        if len(found) == CHECKED:
            break
    if not found:
        raise ExamplesError(
            "no image of the set can be read and has a label of the model"
            f"{first}; check --data and --model"
        )
    return Sample(pixels=np.stack(found), labels=np.array(labels, np.int64))
