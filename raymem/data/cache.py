"""A set that `raymem ingest` decoded once: `Cache` reads it, studies use `CachedExamples`.

_about.json                     what was asked for: size, channels, data, splits
pieces/SPLIT/SHARD-000.npy      pixels, uint8 [rows, H, W, C], in the order of the shard
shards/SPLIT/SHARD.parquet      one row per record of a shard; that it exists means "decoded"
rejects.parquet                 what is left out, and why
index.parquet                   one row per example, train first, sorted by id
cache.json                      written last; that it exists means the cache is whole
"""

from __future__ import annotations

import functools
import json
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from raymem.data.examples import Examples
from raymem.data.local_copy import Split, copied
from raymem.errors import DamagedObjectError, ExamplesError
from raymem.retry import ask, open_fs

FORMAT = 1
SPLITS = ("train", "test")
ABOUT, WHOLE, INDEX, REJECTS = "_about.json", "cache.json", "index.parquet", "rejects.parquet"
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


class CacheAbout(TypedDict):
    """What cache.json holds."""

    format: int
    name: str
    image_shape: tuple[int, int, int]
    classes: list[str]
    n_train: int
    n_test: int
    fingerprint: str
    n_rejects: int
    rejects: dict[str, int]
    class_sizes: dict[str, dict[str, Any]]
    duplicates: dict[str, int]
    findings: list[str]
    raymem: str


class Cache:
    """A finished cache at any fsspec URL. Raises ExamplesError if there is none, or it is
    unfinished.

    It pickles as its URL. Nothing but cache.json is read before it is needed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.fs, root = _file_system(url)
        self._root = root
        text = self._read(WHOLE)
        if text is None:
            raise ExamplesError(_unfinished(self.url, self._read(ABOUT)))
        try:
            about = json.loads(text)
            found = about["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedObjectError(
                f"{self.url}/{WHOLE} does not read back ({error}); delete it and ingest again: "
                "what is decoded is kept"
            ) from error
        if found != FORMAT:
            raise ExamplesError(
                f"{self.url} is a cache of format {found}, this raymem reads {FORMAT}; take the "
                "raymem that made it, or ingest again into another CACHE"
            )
        self.about: CacheAbout = about
        """cache.json: counts, classes, fingerprint, findings."""

    @property
    def url(self) -> str:
        """URL of the cache; a plain absolute path on local disks."""
        local = "file" in self.fs.protocol
        return self._root if local else str(self.fs.unstrip_protocol(self._root))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.url,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        H, W, C = self.about["image_shape"]
        return H, W, C

    def index(self) -> pa.Table:
        """The set's index: no pixels, one row per example, train first, each split sorted by id.

        Its columns are in docs/columns.md. Raises DamagedObjectError.
        """
        return self._index

    @functools.cached_property
    def _index(self) -> pa.Table:
        data = self._read(INDEX)
        try:
            if data is None:
                raise ValueError("it is not there")
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            if (
                json.loads(file.schema_arrow.metadata[b"raymem"])["fingerprint"]
                != self.about["fingerprint"]
            ):
                raise ValueError("it is another set's")
            # Arrow's threads would race with torch's at exit.
            return file.read(use_threads=False)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise DamagedObjectError(
                f"{self.url}/{INDEX} does not read back ({error}); delete it and {WHOLE}, and "
                "ingest again: what is decoded is kept"
            ) from error

    def split(self, name: str) -> pa.Table:
        """The rows of the index of one split, "train" or "test"."""
        start = 0 if name == "train" else self.about["n_train"]
        n = self.about["n_train" if name == "train" else "n_test"]
        return self.index().slice(start, n)

    def labels(self, split: str) -> NDArray[np.int64]:
        """The labels of one split, int64 [n]."""
        found: NDArray[np.int64] = self.split(split)["label"].to_numpy()
        return found

    def arrays(self, folder: str | os.PathLike[str] | None = None) -> Arrays:
        """(x_train, y_train, x_test, y_test), the pixels mapped read-only from this node's disk.

        The first process on a node that asks copies the cache, checking every image against its
        content hash; others wait, then map the same files. They are in FOLDER/FINGERPRINT, where
        FOLDER is `folder`, else $RAYMEM_CACHE_DIR, else ~/.cache/raymem: uint8 [n, H, W, C] in the
        order of the index.

        Raises DamagedObjectError naming a damaged piece, StoreFullError if the disk is too small.
        """
        at = folder or os.environ.get("RAYMEM_CACHE_DIR") or Path.home() / ".cache" / "raymem"
        splits = [
            Split(
                name=name,
                pieces=self.split(name)["piece"],
                rows=self.split(name)["row"],
                hashes=self.split(name)["content_hash"],
            )
            for name in SPLITS
        ]
        x_train, x_test = copied(
            self._fetch,
            splits,
            self.image_shape,
            Path(at).expanduser().absolute() / self.about["fingerprint"],
            self.url,
        )
        return x_train, self.labels("train"), x_test, self.labels("test")

    def _fetch(self, key: str) -> bytes:
        data: bytes = ask(self.fs, lambda: self.fs.cat_file(f"{self._root}/{key}"), self.url)
        return data

    def _read(self, key: str) -> bytes | None:
        try:
            return self._fetch(key)
        except (FileNotFoundError, NotADirectoryError):
            return None


def holds_cache(url: str | os.PathLike[str]) -> bool:
    """Is there a cache at `url`, finished or not?"""
    try:
        fs, root = _file_system(url)
        found = ask(fs, lambda: fs.ls(root, detail=False), str(url))
        names = {posixpath.basename(str(name).rstrip("/")) for name in found}
    except Exception:  # file systems raise many kinds; the reader of the set reports them
        return False
    return WHOLE in names or (ABOUT in names and not names.isdisjoint({"pieces", "shards"}))


def _file_system(url: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    text = os.fspath(url)
    fs, root = open_fs(text if "://" in text else os.path.expanduser(text))
    return fs, root.rstrip("/")


def _unfinished(url: str, about: bytes | None) -> str:
    if about is None:
        return f"there is no cache at {url}; make one with `raymem ingest DATA CACHE`"
    try:
        asked = json.loads(about)
        options = f" --size {asked['size']}" + (" --grey" if asked["channels"] == 1 else "")
        options += "".join(
            f" --{name.replace('_', '-')} '{asked[name]}'"
            for name in ("train", "val", "val_labels")
            if asked.get(name)
        )
        command = f"raymem ingest {asked['data']} {url}{options}"
    except (ValueError, TypeError, KeyError):
        command = f"raymem ingest DATA {url}"
    return f"the cache at {url} is not finished; run `{command}`, which goes on where it stopped"


class CachedExamples(Examples):
    """The set in a cache, as a study sees it.

    What is known without pixels (ids, labels, classes, hashes, fingerprint) comes from the index;
    pixels are copied to this node's disk, and mapped, when `x_train` or `x_test` is first asked
    for. It pickles as the cache's URL.
    """

    cache: Cache

    def __init__(self, cache: Cache | str | os.PathLike[str]) -> None:
        # Ingest has checked it.
        object.__setattr__(self, "cache", cache if isinstance(cache, Cache) else Cache(cache))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.cache.url,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.cache.url!r})"

    @functools.cached_property
    def _arrays(self) -> Arrays:
        return self.cache.arrays()

    @property
    def x_train(self) -> NDArray[np.uint8]:
        """Training images, uint8 [N, H, W, C]."""
        return self._arrays[0]

    @property
    def x_test(self) -> NDArray[np.uint8]:
        """Test images, uint8 [M, H, W, C]."""
        return self._arrays[2]

    @functools.cached_property
    def y_train(self) -> NDArray[np.int64]:
        """Training labels, int64 [N], 0..K-1."""
        return self.cache.labels("train")

    @functools.cached_property
    def y_test(self) -> NDArray[np.int64]:
        """Test labels, int64 [M], 0..K-1."""
        return self.cache.labels("test")

    @functools.cached_property
    def train_ids(self) -> tuple[str, ...]:
        """Ids of the training examples, sorted."""
        return tuple(self.cache.split("train")["example_id"].to_pylist())

    @functools.cached_property
    def test_ids(self) -> tuple[str, ...]:
        """Ids of the test examples, sorted."""
        return tuple(self.cache.split("test")["example_id"].to_pylist())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return tuple(self.cache.about["classes"])

    @property
    def source(self) -> str:
        """The URL of the cache."""
        return self.cache.url

    @property
    def name(self) -> str:
        """Name of the set."""
        return str(self.cache.about["name"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.cache.image_shape

    @functools.cached_property
    def content_hashes(self) -> tuple[str, ...]:
        """128 bits of SHA-256 of each image's shape and pixels, train then test."""
        return tuple(self.cache.index()["content_hash"].to_pylist())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over classes, splits, ids, labels and pixels in order: the set's identity."""
        return str(self.cache.about["fingerprint"])


def pieces_in_order(index: pa.Table) -> list[str]:
    """The keys of an index's pieces, train first, sorted within each split."""
    found: list[str] = []
    for split in SPLITS:
        keys: Sequence[str] = pc.unique(
            index.filter(pc.equal(index["split"], split))["piece"]
        ).to_pylist()
        found += sorted(keys)
    return found
