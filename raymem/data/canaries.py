"""Canaries: training examples made for an audit of privacy, which nothing else teaches a model."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from numpy.typing import NDArray

from raymem.data.cache import CachedExamples
from raymem.data.examples import Examples
from raymem.errors import ExamplesError


def add_canaries(examples: Examples, n: int) -> Examples:
    """The set with n more training examples, last, which are there to be told from one another.

    A canary is an image of black and white noise with a label drawn at random: it is like no other
    image, so that models are right on it only if they trained on it, and its gradient is large and
    in a direction of its own. Pixels and label follow from its id (`canary-00000`, ...) and the
    image shape. `Examples.canaries` names their rows; they are drawn into subsets like all others,
    audited by themselves (link 3), and have no memorization in score tables.

    Raises ExamplesError for fewer than 2, for sets in a cache, and for sets that have canaries.

    >>> from raymem.data import load_examples
    >>> digits = add_canaries(load_examples("digits"), 100)
    >>> digits.x_train.shape, digits.train_ids[-1], len(digits.canaries)
    ((1300, 8, 8, 1), 'canary-00099', 100)
    """
    if n < 2:
        raise ExamplesError(
            f"an audit guesses which of the canaries were trained on, got {n}; take 100 or more"
        )
    if isinstance(examples, CachedExamples):
        raise ExamplesError(
            "canaries cannot be added to a cache: every node reads its images there; take a set in "
            "memory"
        )
    if examples.canaries:
        raise ExamplesError(f"{examples.name} has canaries already; add them once")
    ids = tuple(f"canary-{number:05d}" for number in range(n))
    images, labels = zip(*(_canary(name, examples) for name in ids), strict=True)
    N = len(examples.train_ids)
    return dataclasses.replace(
        examples,
        x_train=np.concatenate([examples.x_train, np.stack(images)]),
        y_train=np.concatenate([examples.y_train, np.array(labels)]),
        train_ids=(*examples.train_ids, *ids),
        canaries=tuple(range(N, N + n)),
        name=f"{examples.name}, {n:,} canaries",
    )


def _canary(name: str, examples: Examples) -> tuple[NDArray[np.uint8], int]:
    H, W, C = examples.image_shape
    drawn = hashlib.shake_256(f"raymem canary {name} {H}x{W}x{C}".encode()).digest(8 + H * W * C)
    pixels = np.frombuffer(drawn[8:], np.uint8).reshape(H, W, C)
    label = int.from_bytes(drawn[:8], "big") % examples.n_classes
    return np.where(pixels < 128, 0, 255).astype(np.uint8), label
