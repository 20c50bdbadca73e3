"""Labelled images in one fixed order, with ids, content hashes, duplicates and a fingerprint.

In:  a name (`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`), an `.npz` file, a folder
     with one folder per class, the URL of a cache that `raymem ingest` made, or arrays.
Out: `Examples`. What cannot be used as it is, is refused with the ids concerned; nothing is cast,
     clipped or dropped in silence.
"""

from raymem.examples.cache import Cache, CachedExamples, holds_cache
from raymem.examples.checks import arrays_of_npz
from raymem.examples.examples import Examples, fingerprint_of, group_column
from raymem.examples.flipped import flip_labels
from raymem.examples.near import near_duplicates
from raymem.examples.pixels import example_id
from raymem.examples.readers import NAMED, load_examples

__all__ = [
    "NAMED",
    "Cache",
    "CachedExamples",
    "Examples",
    "arrays_of_npz",
    "example_id",
    "fingerprint_of",
    "flip_labels",
    "group_column",
    "holds_cache",
    "load_examples",
    "near_duplicates",
]
