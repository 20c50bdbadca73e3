"""Finds train and test in a large set: their shards and classes.

DATA/train/CLASS/*, DATA/val/CLASS/*     folders; also below Kaggle's ILSVRC/Data/CLS-LOC
DATA/train/CLASS/*, DATA/val/*           val flat, with a map of labels (see val_labels)
DATA/**/*.tar, DATA/**/*.parquet         by a folder or a file name that has train or val in it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from raymem.data.array_checks import some
from raymem.data.shards.records import Shard, parts
from raymem.data.shards.shard_readers import LABEL_COLUMNS, is_image, list_files, list_shards
from raymem.data.shards.val_labels import NAMES, read_labels
from raymem.errors import ExamplesError, first_line

KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
# The test of ILSVRC and of many sets on Hugging Face has no labels: only where there is no other.
HELD_OUT = ("val", "validation", "valid", "test")
SPLIT = re.compile(r"(?:^|[^a-z])(train|training|val|validation|valid|test|testing)(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The shards of a set, and what is known of its classes before images are read."""

    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    folders: tuple[str, ...] | None = None
    """Names of the training folders, which are the classes."""
    names: tuple[str, ...] | None = None
    """Names of classes in the metadata of a Parquet file."""
    val_labels: str = ""
    """URL of the map of labels that was used, or ""."""
    val_labels_digest: str = ""
    """SHA-256 of that map."""
    left_out: str = ""
    """What is there but is not read, in words."""

    def facts(self) -> dict[str, object]:
        """What the labels depend on, JSON-ready, to be recorded and compared."""
        names = self.folders and hashlib.sha256("\0".join(self.folders).encode()).hexdigest()
        return {
            "class_folders": len(self.folders) if self.folders else None,
            "class_folders_digest": names or None,
            "val_labels_digest": self.val_labels_digest or None,
        }


def find_splits(
    data: str,
    *,
    train: str | None = None,
    val: str | None = None,
    val_labels: str | None = None,
    but: str = "",
) -> Splits:
    """Train and test in the set at `data`; `train` and `val` say where, relative to it or as URLs.

    What is below the URL `but`, a cache inside the set, is left out.

    Raises ExamplesError if the splits cannot be identified, or if classes do not fit.
    """
    if (train is None) != (val is None):
        raise ExamplesError("--train and --val go together; give both, or neither")
    fs, root = _root(data)
    if train is not None and val is not None:
        return _of_two(_below_or_url(data, train), _below_or_url(data, val), val_labels)
    folders = _split_folders(fs, root)
    if "train" in folders:
        held = _held_out(data, list(folders))
        left = [name for name in HELD_OUT if name in folders and name != held]
        url = str(fs.unstrip_protocol(folders[held]))
        found = _of_two(str(fs.unstrip_protocol(folders["train"])), url, val_labels)
        return dataclasses.replace(found, left_out=", ".join(f"{name}/" for name in left))
    return _by_names(str(fs.unstrip_protocol(root)) if fs.isdir(root) else data, but)


def _root(data: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, path = fsspec.core.url_to_fs(data)
        path = str(path).rstrip("/")
        for below in KAGGLE:
            if fs.isdir(f"{path}/{below}"):
                return fs, f"{path}/{below}"
        return fs, path
    except (ImportError, ValueError) as error:
        raise ExamplesError(
            f"no file system for {data} ({error}); s3:// needs pip install 'raymem[s3]', gs:// "
            "needs 'raymem[gcs]'"
        ) from error


def _split_folders(fs: AbstractFileSystem, root: str) -> dict[str, str]:
    """The folders in `root` with the names of splits, by name in lower case."""
    try:
        paths = [str(path).rstrip("/") for path in fs.ls(root, detail=False)]
        named = {posixpath.basename(path).lower(): path for path in paths}
        # Links to folders are folders to isdir alone.
        return {
            name: named[name]
            for name in ("train", *HELD_OUT)
            if name in named and fs.isdir(named[name])
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}  # a pattern, or nothing, which list_shards reports
    except Exception as error:  # file systems raise many kinds
        raise ExamplesError(
            f"{root} cannot be listed ({first_line(error)}); check the URL and the network"
        ) from error


def _below_or_url(data: str, pattern: str) -> str:
    if "://" in pattern or pattern.startswith("/"):
        return pattern
    return f"{data.rstrip('/')}/{pattern}"


def _held_out(data: str, folders: Sequence[str]) -> str:
    labelled = [name for name in HELD_OUT[:-1] if name in folders]
    if len(labelled) > 1:
        raise ExamplesError(f"{data} has {some(labelled)}; give --train and --val")
    if not labelled and "test" not in folders:
        raise ExamplesError(
            f"{data} has train, but none of {', '.join(HELD_OUT)}; memorization needs test images "
            "too: give --train and --val"
        )
    return labelled[0] if labelled else "test"


def _by_names(data: str, but: str) -> Splits:
    """Tars or Parquet files whose split is in their names; the last such word counts."""
    shards = list_shards(data)
    if but:
        shards = [s for s in shards if not _path(s.url).startswith(f"{_path(but)}/")]
    if not shards:
        raise ExamplesError(f"there is nothing but a cache at {data}; check DATA")
    if shards[0].kind == "cache":
        raise ExamplesError(f"{data} is a cache already; studies take it as --data")
    if shards[0].kind == "folder":
        raise ExamplesError(
            f"{data} has folders of images, but no train/; put them into train/ and val/, or give "
            "--train and --val"
        )
    of: dict[str, list[Shard]] = {"train": [], "val": [], "test": []}
    unknown = []
    for shard in shards:
        words = SPLIT.findall(shard.name.lower())
        if words:
            of["val" if words[-1].startswith("val") else words[-1].removesuffix("ing")].append(
                shard
            )
        else:
            unknown.append(shard.name)
    if unknown:
        raise ExamplesError(
            f"{len(unknown)} shards at {data} have neither train nor val in their names, such as "
            f"{some(unknown[:3])}; give --train and --val"
        )
    test = of["val"] or of["test"]
    left = of["test"] if of["val"] else []
    if not of["train"] or not test:
        raise ExamplesError(
            f"{data} has {len(of['train'])} shards of train and {len(test)} of val, and both are "
            "needed; give --train and --val"
        )
    return Splits(
        train=tuple(of["train"]),
        test=tuple(test),
        names=_names(of["train"]),
        left_out=f"{len(left)} shards of test" if left else "",
    )


def _path(url: str) -> str:
    return url.partition("://")[2] or url


def _of_two(train: str, val: str, val_labels: str | None) -> Splits:
    """Each split is a folder of images, or tars or Parquet."""
    train_files, val_files = _split_files(train), _split_files(val)
    if not train_files.images:
        found = train_files.shards(train), val_files.shards(val)
        if any(shard.kind == "folder" for shard in found[1]):
            raise ExamplesError(f"{train} has shards and {val} folders of images; give both alike")
        return Splits(train=found[0], test=found[1], names=_names(found[0]))
    if not val_files.images:
        raise ExamplesError(f"there are no images at {val}; check the URL, or give --val")
    classes = train_files.classes()
    train_shards = train_files.by_class(classes)
    unknown = sorted(set(val_files.classes()) - set(classes))
    if val_files.classes() and not unknown and val_labels is None:
        return Splits(train=train_shards, test=val_files.by_class(classes), folders=classes)
    url = val_labels or _beside(val_files)
    if url is None and unknown:
        raise ExamplesError(
            f"the folders {some(unknown)} of {val} are none of train's classes, which are like "
            f"{some(classes[:3])}; name them so, or give --val-labels"
        )
    if url is None:
        raise ExamplesError(
            f"the images in {val} are in no class folders, and no map of labels is beside them "
            f"({', '.join(NAMES)}); give --val-labels FILE"
        )
    labels, content = read_labels(url, val_files.images, classes)
    return Splits(
        train=train_shards,
        test=tuple(val_files.parts("", None, val_files.images, labels)),
        folders=classes,
        val_labels=url,
        val_labels_digest=hashlib.sha256(content).hexdigest(),
    )


@dataclass(frozen=True)
class _SplitFiles:
    """What is below the URL of one split."""

    fs: AbstractFileSystem
    root: str
    """The split's folder."""
    images: list[str]
    """Paths of images relative to it, sorted."""

    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({image.partition("/")[0] for image in self.images if "/" in image}))

    def by_class(self, classes: Sequence[str]) -> tuple[Shard, ...]:
        """The shards of the split's class folders, numbered as in `classes`."""
        files: dict[str, list[str]] = {}
        for image in self.images:
            name, slash, rest = image.partition("/")
            if not slash:
                raise ExamplesError(
                    f"{self.fs.unstrip_protocol(self.root)} should have one folder of images per "
                    f"class, but has images outside of them, such as {image}; move them"
                )
            files.setdefault(name, []).append(rest)
        return tuple(
            part
            for label, name in enumerate(classes)
            if name in files
            for part in self.parts(name, label, files[name])
        )

    def parts(
        self, name: str, label: int | None, files: Sequence[str], labels: Sequence[int | None] = ()
    ) -> list[Shard]:
        at = f"{self.root}/{name}" if name else self.root
        folder = Shard(
            url=str(self.fs.unstrip_protocol(at)),
            name=name or posixpath.basename(self.root),
            kind="folder",
            label=label,
            # So that ids begin with the split's folder, and are unique over both.
            root=str(self.fs.unstrip_protocol(posixpath.dirname(self.root))),
        )
        return parts(folder, files, labels)

    def shards(self, url: str) -> tuple[Shard, ...]:
        prefix = posixpath.basename(self.root)
        return tuple(
            dataclasses.replace(shard, name=f"{prefix}/{shard.name}") for shard in list_shards(url)
        )


def _split_files(url: str) -> _SplitFiles:
    fs, files, root = list_files(url)
    below = [file.removeprefix(root).lstrip("/") for file in files]
    images = [f for f in below if is_image(f) and not re.search(r"(^|/)\.", f)]
    return _SplitFiles(fs, root, sorted(images))


def _beside(val: _SplitFiles) -> str | None:
    """The first map of labels in the validation folder or where it usually lies beside it."""
    root = posixpath.dirname(val.root)
    places = [val.root, root, f"{root}/ILSVRC2012_devkit_t12/data", f"{root}/data"]
    if posixpath.basename(root) == "CLS-LOC":
        # Kaggle's is beside ILSVRC/, in which the images are three folders deep.
        up = posixpath.dirname
        places += [up(up(root)), up(up(up(root)))]
    for place in places:
        for name in NAMES:
            if place and val.fs.isfile(f"{place}/{name}"):
                return str(val.fs.unstrip_protocol(f"{place}/{name}"))
    return None


def _names(shards: Sequence[Shard]) -> tuple[str, ...] | None:
    """Hugging Face's names of the classes, in the metadata of the first Parquet file that reads."""
    for shard in shards:
        if shard.kind != "parquet":
            return None
        fs, path = fsspec.core.url_to_fs(shard.url)
        try:
            with fs.open(path, "rb") as file:
                metadata = pq.read_schema(file).metadata or {}
        except (pa.ArrowException, OSError):  # reported when it is decoded
            continue
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            label = next(name for name in LABEL_COLUMNS if name in features)
            return tuple(map(str, features[label]["names"]))
        except (KeyError, TypeError, ValueError, StopIteration):
            return None
    return None
