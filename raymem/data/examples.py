"""`Examples`: labelled images in one fixed order, their hashes, duplicates and fingerprint.

Shapes: N training and M test examples, H x W pixels, C channels, K classes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymem.data.array_checks import (
    as_images,
    as_labels,
    encodable,
    numbered_ids,
    repeated_ids,
    some,
)
from raymem.data.duplicates import is_searchable, near_duplicates
from raymem.data.pixels import content_hash
from raymem.errors import ExamplesError


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A labelled image set, split into train and test, checked once when it is made.

    Arrays are taken as they are if they are right (uint8 NHWC images, int64 labels); grey images
    without a channel axis get one, and floats must be in [0, 1] and stand for 8-bit values.

    Raises ExamplesError, naming the ids, for labels out of range, soft or missing labels, NaN,
    unequal lengths or image shapes, repeated ids, empty sets.

    >>> import numpy as np
    >>> x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    >>> x[:, 0, 0] = range(4)
    >>> examples = Examples(x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    >>> examples.x_train.shape, examples.n_classes, examples.train_ids[0]
    ((4, 8, 8, 1), 2, 'train-00000')
    >>> len(examples.duplicate_groups())  # the two test images are copies of training images
    2
    """

    x_train: NDArray[np.uint8]
    """Training images, uint8 [N, H, W, C]."""
    y_train: NDArray[np.int64]
    """Training labels, int64 [N], 0..K-1."""
    x_test: NDArray[np.uint8]
    """Test images, uint8 [M, H, W, C]."""
    y_test: NDArray[np.int64]
    """Test labels, int64 [M], 0..K-1."""
    classes: tuple[str, ...] = ()
    """Names of the K classes; "0".."K-1" if not given."""
    train_ids: tuple[str, ...] = ()
    """Ids of the training examples, unique over both splits; train-00000, ... if not given."""
    test_ids: tuple[str, ...] = ()
    """Ids of the test examples."""
    name: str = "arrays"
    """Name of the set; not part of its identity."""
    source: str = ""
    """The argument of `load_examples`, so that the images can be found again; not part of the
    identity. Empty: arrays."""
    planted: tuple[int, ...] = ()
    """Rows of training examples whose labels were flipped on purpose; see `flip_labels`."""
    canaries: tuple[int, ...] = ()
    """Rows of training examples that were made for an audit; see `add_canaries`."""

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for split in ("train", "test"):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if len(x) != len(y):
                raise ExamplesError(
                    f"{len(x)} {split} images but {len(y)} {split} labels; give one label per image"
                )
            if len(x) == 0:
                raise ExamplesError(f"the {split} set is empty; memorization needs both splits")
            ids = tuple(map(str, getattr(self, f"{split}_ids"))) or numbered_ids(split, len(x))
            if len(ids) != len(x):
                raise ExamplesError(f"{len(x)} {split} images but {len(ids)} {split} ids")
            odd = [ascii(name) for name in ids if not encodable(name)]
            if odd:
                raise ExamplesError(f"ids must be text (UTF-8); not so: {some(odd)}; rename them")
            put(f"{split}_ids", ids)
            put(f"x_{split}", as_images(x, ids))
            put(f"y_{split}", as_labels(y, ids))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ExamplesError(
                f"training images are {self.x_train.shape[1:]} but test images are "
                f"{self.x_test.shape[1:]}; resize one of them"
            )
        repeated = repeated_ids((*self.train_ids, *self.test_ids))
        if repeated:
            raise ExamplesError(f"ids must be unique over both splits; repeated: {some(repeated)}")
        put("classes", tuple(map(str, self.classes)) or self._numbered_classes())
        self._check_label_range()

    def _numbered_classes(self) -> tuple[str, ...]:
        present = np.unique(self.y_train)
        K = int(max(self.y_train.max(), self.y_test.max())) + 1
        if len(present) != K:
            absent = sorted(set(range(min(K, 10_000))) - set(present.tolist()))
            raise ExamplesError(
                f"labels go up to {K - 1}, but no training example has label {some(absent)}; "
                "relabel to 0..K-1, or name all classes if one may be empty"
            )
        return tuple(map(str, range(K)))

    def _check_label_range(self) -> None:
        K = len(self.classes)
        if K < 2:
            raise ExamplesError("there is only one class; a classifier needs two or more")
        for y, ids in ((self.y_train, self.train_ids), (self.y_test, self.test_ids)):
            bad = np.flatnonzero((y < 0) | (y >= K))
            if len(bad):
                raise ExamplesError(
                    f"{len(bad)} labels are outside 0..{K - 1}: "
                    + some(f"{ids[i]} has {y[i]}" for i in bad)
                )

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return len(self.classes)

    @property
    def n_examples(self) -> int:
        """N + M."""
        return len(self.train_ids) + len(self.test_ids)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        H, W, C = self.x_train.shape[1:]
        return H, W, C

    @functools.cached_property
    def content_hashes(self) -> tuple[str, ...]:
        """128 bits of SHA-256 over each image's shape and pixels, train then test. Labels not."""
        return tuple(content_hash(image) for x in (self.x_train, self.x_test) for image in x)

    def duplicate_groups(self) -> list[NDArray[np.int64]]:
        """Rows (train then test) with exactly equal pixels, one array per group of two or more."""
        rows: dict[str, list[int]] = {}
        for row, digest in enumerate(self.content_hashes):
            rows.setdefault(digest, []).append(row)
        return [np.array(group) for group in rows.values() if len(group) > 1]

    def near_duplicate_groups(self) -> list[NDArray[np.int64]]:
        """Rows (train then test) of groups of near duplicates, exact ones among them.

        See `near_duplicates`; in sets too large for its search, the exact duplicates.
        """
        # Checked first: pixels of large sets may not be at hand.
        if not is_searchable(len(set(self.content_hashes)), self.image_shape):
            return self.duplicate_groups()
        found = near_duplicates(np.concatenate([self.x_train, self.x_test]))
        return self.duplicate_groups() if found is None else found

    def label_conflicts(self) -> list[NDArray[np.int64]]:
        """The duplicate groups whose members do not all have one label."""
        labels = np.concatenate([self.y_train, self.y_test])
        return [g for g in self.duplicate_groups() if len(np.unique(labels[g])) > 1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, splits, ids, labels and pixels in order: the set's identity."""
        return fingerprint_of(self.index_table(), self.image_shape, self.classes)

    def index_table(self) -> pa.Table:
        """The set's index as in `examples.parquet`: no pixels, one row per example, train first.

        Without the column of near duplicates, which takes a search to find.
        """
        N, M = len(self.train_ids), len(self.test_ids)
        return pa.table(
            {
                "split": pa.array(["train"] * N + ["test"] * M),
                "index": pa.array(np.concatenate([np.arange(N), np.arange(M)])),
                "example_id": pa.array((*self.train_ids, *self.test_ids)),
                "label": pa.array(np.concatenate([self.y_train, self.y_test])),
                "content_hash": pa.array(self.content_hashes),
                "duplicate_group": group_column(self.duplicate_groups(), N + M),
            }
        )

    def describe(self) -> str:
        """The set in one line, with what is suspicious about it."""
        H, W, C = self.image_shape
        groups, conflicts = self.duplicate_groups(), self.label_conflicts()
        text = (
            f"{self.name}: {len(self.train_ids):,} train and {len(self.test_ids):,} test images, "
            f"{H}x{W}x{C}, {self.n_classes} classes"
        )
        if groups:
            text += f"; {len(groups)} groups of exact duplicates"
        if conflicts:
            ids = (*self.train_ids, *self.test_ids)
            shown = some(" = ".join(ids[row] for row in group[:3]) for group in conflicts)
            text += f", {len(conflicts)} of them with different labels: {shown}"
        return text


def group_column(groups: Sequence[NDArray[np.int64]], n: int) -> pa.Array:
    """The number of each row's group, [n]; null for rows in none."""
    number = np.full(n, -1, np.int64)
    for group, rows in enumerate(groups):
        number[rows] = group
    return pa.array(number, mask=number < 0)


def fingerprint_of(
    index: pa.Table, image_shape: tuple[int, int, int], classes: Sequence[str]
) -> str:
    """The fingerprint of the set with this index (see `Examples.index_table`)."""
    digest = hashlib.sha256(repr((image_shape, tuple(classes))).encode())
    names = ("split", "example_id", "label", "content_hash")
    for row in zip(*(index[name].to_pylist() for name in names), strict=True):
        digest.update("\0".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()
