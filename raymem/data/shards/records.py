"""`Shard`, a part of a set that is read at once, and `Record`, an image in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["tar", "parquet", "folder", "cache"]
# Folders with more files are split: 50,000 images are too many for one task and one object.
FOLDER_FILES = 1000


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a set that is read at once, and has one object of scores."""

    url: str
    """URL of the file or folder."""
    name: str
    """Its path in the set without suffix: the name of its object."""
    kind: Kind
    label: int | None = None
    """Folders: the class of all of its images."""
    root: str = ""
    """URL of the set: names of shards, and ids of images in folders, are relative to it."""
    files: tuple[str, ...] = ()
    """Folders: the images of this part, relative to `url`; none: all that are there."""
    labels: tuple[int | None, ...] = ()
    """Folders: the class of each of `files`, if they differ."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One encoded image, or an error in its place."""

    example_id: str
    label: int | None
    data: bytes
    error: str = ""
    pixels: NDArray[np.uint8] | None = None
    """Of a cache: the image as it was decoded, uint8 [H, W, C]; there is no `data` then."""


def parts(
    folder: Shard, files: Sequence[str], labels: Sequence[int | None] = (), most: int | None = None
) -> list[Shard]:
    """The folder with these files, cut into parts of nearly equal length.

    No part has more than `most` files, by default FOLDER_FILES.

    >>> folder = Shard(url="set/cat", name="cat", kind="folder", label=0)
    >>> [(part.name, part.files) for part in parts(folder, ["1.png", "2.png", "3.png"], most=2)]
    [('cat.1-of-2', ('1.png',)), ('cat.2-of-2', ('2.png', '3.png'))]
    """
    n = max(1, -(-len(files) // (most or FOLDER_FILES)))
    edges = [len(files) * k // n for k in range(n + 1)]
    return [
        dataclasses.replace(
            folder,
            name=folder.name if n == 1 else f"{folder.name}.{k + 1:0{len(str(n))}d}-of-{n}",
            files=tuple(files[edges[k] : edges[k + 1]]),
            labels=tuple(labels[edges[k] : edges[k + 1]]),
        )
        for k in range(n)
    ]
