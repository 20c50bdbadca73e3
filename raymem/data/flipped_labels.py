"""Labels flipped on purpose: a ground truth for methods that find label errors."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

from raymem.data.cache import CachedExamples
from raymem.data.examples import Examples
from raymem.errors import ExamplesError


def flip_labels(examples: Examples, share: float) -> Examples:
    """The set with the labels of round(share * N) training examples changed to another class.

    Which, and to what, follows from their ids alone: the same examples are flipped in every run,
    and a larger share flips more beside them. `Examples.planted` names their rows.

    Raises ExamplesError for a share outside [0, 1], and for sets in a cache, whose labels are
    there.

    >>> from raymem.data import load_examples
    >>> digits = load_examples("digits")
    >>> flipped = flip_labels(digits, 0.1)
    >>> len(flipped.planted), int((flipped.y_train != digits.y_train).sum())
    (120, 120)
    """
    if not 0 <= share <= 1:
        raise ExamplesError(f"the share of labels to flip must be in [0, 1], got {share}")
    if isinstance(examples, CachedExamples):
        raise ExamplesError(
            "labels of a cache cannot be flipped: every node reads them there; flip those of the "
            "set before it is ingested"
        )
    K = examples.n_classes
    if K < 2:
        raise ExamplesError("with one class there is no wrong label")
    draws = [_draw(example_id) for example_id in examples.train_ids]
    order = sorted(range(len(draws)), key=lambda row: draws[row])
    rows = np.sort(np.array(order[: round(share * len(order))], np.int64))
    y: NDArray[np.int64] = examples.y_train.copy()
    shift = np.array([1 + draws[row] % (K - 1) for row in rows], np.int64)
    y[rows] = (y[rows] + shift) % K
    return dataclasses.replace(
        examples,
        y_train=y,
        planted=tuple(rows.tolist()),
        name=f"{examples.name}, {len(rows):,} labels flipped",
    )


def _draw(example_id: str) -> int:
    digest = hashlib.sha256(f"raymem flip {example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
