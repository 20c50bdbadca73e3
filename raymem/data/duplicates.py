"""Near duplicates: images that differ by no more than recompression or slight noise.

Shapes: n images of H x W pixels and C channels.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Root mean square difference of pixels on the 0..255 scale, below which two images are near
# duplicates.
NEAR_RMS = 5.0
# Limits of the search: multiplications (minutes of one core), and bytes in memory.
MOST_WORK, MOST_BYTES = 5e12, 4e9
GRID = 8
TILE = 2048
# Limit of pairs that are compared in full: among nearly blank images, all would be.
LOOKS_PER_IMAGE, SOME_LOOKS = 20, 100_000


def near_duplicates(x: NDArray[np.uint8], rms: float = NEAR_RMS) -> list[NDArray[np.int64]] | None:
    """Groups of images x (uint8 [n, H, W, C]) whose nearest neighbours are within `rms`.

    Two images are linked if the root mean square difference of their pixels is at most `rms` (0 to
    255); groups are what links connect, smallest row first. All pairs count: the mean over blocks
    of pixels brings images nearer, never farther, so pairs that are far apart there need no further
    look. None if the set is very large, or most of it is alike.

    >>> x = np.zeros((3, 4, 4, 1), np.uint8)
    >>> x[1], x[2] = 2, 90
    >>> [group.tolist() for group in near_duplicates(x)]
    [[0, 1]]
    """
    first, exact = _exact(x)
    distinct = x[first]
    links = _links(distinct, rms)
    return (
        None
        if links is None
        else _connected(len(x), [*exact, *((first[a], first[b]) for a, b in links)])
    )


def is_searchable(n: int, image_shape: tuple[int, int, int]) -> bool:
    """Is a set of n distinct images small enough for `near_duplicates`?

    >>> is_searchable(60_000, (32, 32, 3)), is_searchable(1_331_167, (64, 64, 3))
    (True, False)
    """
    H, W, C = image_shape
    b = _block(H, W)
    work = float(n) * n * (H // b) * (W // b) * C
    return work <= MOST_WORK and float(n) * H * W * C <= MOST_BYTES


def _exact(x: NDArray[np.uint8]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """The first row of each image, and links of its exact copies to it."""
    seen: dict[bytes, int] = {}
    links = []
    for row, image in enumerate(x):
        digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
        first = seen.setdefault(digest, row)
        if first != row:
            links.append((first, row))
    return np.array(list(seen.values()), np.int64), links


def _links(x: NDArray[np.uint8], rms: float) -> list[tuple[int, int]] | None:
    n, H, W, C = x.shape
    if not is_searchable(n, (H, W, C)):
        return None
    small, weight = _shrunk(x)
    most = rms**2 * x[0].size
    squares = (small.astype(np.float64) ** 2).sum(axis=1)
    links: list[tuple[int, int]] = []
    looks = 0
    for start in range(0, n, TILE):
        rows = small[start : start + TILE]
        for other in range(start, n, TILE):
            columns = small[other : other + TILE]
            apart = squares[start : start + TILE, None] + squares[None, other : other + TILE]
            apart = weight * (apart - 2.0 * (rows @ columns.T))
            # float32 products: a margin, as the whole images decide.
            row, column = np.nonzero(apart <= most + 1e-5 * weight * squares.max())
            row, column = row + start, column + other
            row, column = row[row < column], column[row < column]
            looks += len(row)
            if looks > LOOKS_PER_IMAGE * n + SOME_LOOKS:
                return None
            links += [
                (int(a), int(b))
                for a, b in zip(row, column, strict=True)
                if _squared_distance(x[a], x[b]) <= most
            ]
    return links


def _shrunk(x: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
    """Block means on a grid of about 8 x 8, [n, D], and the pixels each stands for.

    `weight` times the squared distance of block means is at most that of the pixels.
    """
    n, H, W, C = x.shape
    b = _block(H, W)
    rows, columns = H // b, W // b
    cut = x[:, : rows * b, : columns * b].reshape(n, rows, b, columns, b, C)
    means = cut.mean(axis=(2, 4), dtype=np.float32).reshape(n, -1)
    return means - means.mean(axis=0), float(b * b)


def _block(H: int, W: int) -> int:
    return max(1, min(H, W) // GRID)


def _squared_distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    difference = a.astype(np.int64) - b.astype(np.int64)
    return float((difference * difference).sum())


def _connected(n: int, links: list[tuple[int, int]]) -> list[NDArray[np.int64]]:
    if not links:
        return []
    # scipy takes a second to import; few sets have near duplicates.
    from scipy import sparse
    from scipy.sparse import csgraph

    a, b = np.array(links, np.int64).T
    graph = sparse.coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n))
    _, group = csgraph.connected_components(graph, directed=False)
    members = np.unique(np.concatenate([a, b]))
    numbers = dict.fromkeys(group[members].tolist())
    return [members[group[members] == number] for number in numbers]
