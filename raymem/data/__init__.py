"""Labelled images in one fixed order, with ids, content hashes, duplicates and a fingerprint.

In:  a name (`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`), an `.npz` file, a folder
     with one folder per class, the URL of a cache that `raymem ingest` made, or arrays.
Out: `Examples`. What cannot be used as it is, is refused with the ids concerned; nothing is cast,
     clipped or dropped in silence.

Large sets in shards, and the cache they are decoded into, are in `raymem.data.shards`.
"""

from raymem.data.array_checks import arrays_of_npz
from raymem.data.cache import Cache, CachedExamples, holds_cache
from raymem.data.canaries import add_canaries
from raymem.data.duplicates import near_duplicates
from raymem.data.examples import Examples, fingerprint_of, group_column
from raymem.data.flipped_labels import flip_labels
from raymem.data.join import ABSENT, different, repeated, rows_of
from raymem.data.load import NAMED, draw_training, load_examples
from raymem.data.pixels import example_id

__all__ = [
    "ABSENT",
    "NAMED",
    "Cache",
    "CachedExamples",
    "Examples",
    "add_canaries",
    "arrays_of_npz",
    "different",
    "draw_training",
    "example_id",
    "fingerprint_of",
    "flip_labels",
    "group_column",
    "holds_cache",
    "load_examples",
    "near_duplicates",
    "repeated",
    "rows_of",
]
