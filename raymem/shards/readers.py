"""Shards of encoded images: what there is at a URL, and one shard record by record.

A shard is a WebDataset tar, a Parquet file with encoded images as on Hugging Face, or a folder of
images that are one class. Nothing is decoded here.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raymem.errors import ExamplesError
from raymem.examples.pixels import IMAGE_SUFFIXES, example_id

Kind = Literal["tar", "parquet", "folder"]
SUFFIXES: dict[str, Kind] = {
    ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".parquet": "parquet",
}  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls", "target", "class")
ID_COLUMNS = ("example_id", "id", "__key__", "key")
LABEL_MEMBERS = ("cls", "label", "index")
ROWS = 64
BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a set that is read in one go, and gives one object of scores."""

    url: str
    """Of the file or folder."""
    name: str
    """Its path in the set without suffix: the name of its object."""
    kind: Kind
    label: int | None = None
    """Folders: the class of all of its images."""
    root: str = ""
    """Folders: the set's path, to which ids are relative."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One encoded image, or what is known of one that cannot be read."""

    example_id: str
    label: int | None
    data: bytes
    error: str = ""


def list_shards(data: str, classes: Sequence[str] | None = None) -> list[Shard]:
    """The shards of a set: a tar or Parquet file, a pattern with *, a folder of such or of images.

    Folders of images are classes, numbered as in `classes` if all are there, else in the order of
    their names. Raises ExamplesError if there is nothing to read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(data)
    except (ImportError, ValueError) as error:
        raise ExamplesError(
            f"no file system for {data} ({error}); s3:// needs pip install 'raymem[s3]', gs:// "
            "needs 'raymem[gcs]'"
        ) from error
    path = path.rstrip("/")
    if "*" in path:
        files = sorted(map(str, fs.glob(path)))
        root = posixpath.dirname(path.partition("*")[0])
    elif fs.isfile(path):
        files, root = [path], posixpath.dirname(path)
    else:
        files, root = sorted(map(str, fs.find(path))) if fs.isdir(path) else [], path
    files = [file for file in files if not posixpath.basename(file).startswith(".")]
    shards = [
        Shard(
            url=fs.unstrip_protocol(file),
            name=file.removeprefix(root).lstrip("/").removesuffix(suffix),
            kind=SUFFIXES[suffix],
        )
        for file in files
        if (suffix := _suffix(file)) is not None
    ]
    shards = shards or _folders(fs, files, root, classes)
    if not shards:
        what = "write the pattern with *, not with braces" if "{" in data else "check the URL"
        raise ExamplesError(
            f"there are no .tar, .parquet or image files at {data}; {what}, and give a file, a "
            "pattern, or a folder"
        )
    names = [shard.name for shard in shards]
    twice = sorted({name for name in names if names.count(name) > 1}) if _repeats(names) else []
    if twice:
        raise ExamplesError(
            f"two shards at {data} are named {twice[0]}; give the tar and the Parquet files as two "
            "patterns"
        )
    return shards


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)


def _suffix(file: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), None)


def _is_image(file: str) -> bool:
    return posixpath.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _folders(
    fs: Any, files: Sequence[str], root: str, classes: Sequence[str] | None
) -> list[Shard]:
    folders = sorted({posixpath.dirname(file) for file in files if _is_image(file)})
    names = sorted({posixpath.basename(folder) for folder in folders})
    known = list(classes) if classes and set(names) <= set(classes) else names
    return [
        Shard(
            url=fs.unstrip_protocol(folder),
            name=folder.removeprefix(root).lstrip("/") or posixpath.basename(folder),
            kind="folder",
            # Images in the set's own folder have no class.
            label=None if folder == root else known.index(posixpath.basename(folder)),
            root=root,
        )
        for folder in folders
    ]


def read_shard(shard: Shard) -> Iterator[Record]:
    """The records of a shard, in its order. A shard that ends early ends with a record of error.

    Raises ExamplesError if a Parquet file has no column of encoded images.
    """
    fs, path = fsspec.core.url_to_fs(shard.url)
    readers = {"tar": _tar, "parquet": _parquet, "folder": _folder}
    yield from readers[shard.kind](fs, path, shard)


def _tar(fs: Any, path: str, shard: Shard) -> Iterator[Record]:
    key, members = None, dict[str, bytes]()
    with fs.open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    if not member.isfile() or name.startswith("."):
                        continue
                    stem, _, extension = name.partition(".")
                    this = f"{folder}/{stem}" if folder else stem
                    if this != key:
                        yield from _of_members(key, members)
                        key, members = this, {}
                    content = tar.extractfile(member)
                    members[extension.lower()] = content.read() if content else b""
        except (tarfile.TarError, EOFError, OSError) as error:
            # The last one is whole if its label is there.
            yield from (record for record in _of_members(key, members) if record.label is not None)
            yield _rest(shard, error)
            return
    yield from _of_members(key, members)
    if not _is_closed(fs, path):
        yield _rest(shard, tarfile.ReadError("its end-of-archive mark is missing"))


def _is_closed(fs: Any, path: str) -> bool:
    """A tar cut between two members reads without error; only its zeros at the end are missing."""
    if not path.lower().endswith(".tar") or fs.size(path) == 0:
        return True
    return not any(fs.cat_file(path, start=-BLOCK))


def _of_members(key: str | None, members: dict[str, bytes]) -> Iterator[Record]:
    """The record of the members that share a key; those without an image are none."""
    image = [
        data for name, data in members.items() if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES
    ]
    if key is None or not image:
        return
    label, error = None, ""
    try:
        for name in LABEL_MEMBERS:
            if name in members:
                label = int(members[name])
        if label is None and "json" in members:
            about = json.loads(members["json"])
            label = next((int(about[name]) for name in LABEL_COLUMNS if name in about), None)
    except (ValueError, TypeError) as wrong:
        error = f"its label is no number ({wrong})"
    yield Record(example_id=example_id(key), label=label, data=image[0], error=error)


def _parquet(fs: Any, path: str, shard: Shard) -> Iterator[Record]:
    number = 0
    try:
        with fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            image, label, identity = _columns(parquet.schema_arrow, shard)
            wanted = [name for name in (image, label, identity) if name]
            for batch in parquet.iter_batches(ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    yield _of_row(row, image, label, identity, f"{shard.name}-{number:06d}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        yield _rest(shard, error)


def _columns(schema: pa.Schema, shard: Shard) -> tuple[str, str | None, str | None]:
    def encoded(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names = [name for name in IMAGE_COLUMNS if name in schema.names and encoded(name)]
    names += [name for name in schema.names if pa.types.is_struct(schema.field(name).type)]
    names = [name for name in names if encoded(name)]
    if not names:
        raise ExamplesError(
            f"{shard.url} has the columns {', '.join(schema.names)}, none of encoded images; name "
            "it `image`, binary or a struct with `bytes`"
        )
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    identity = next((name for name in ID_COLUMNS if name in schema.names), None)
    return names[0], label, identity


def _of_row(
    row: dict[str, Any], image: str, label: str | None, identity: str | None, default: str
) -> Record:
    cell = row[image]
    path = cell.get("path") if isinstance(cell, dict) else None
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    name = row[identity] if identity else None
    if name is None and path:
        found = example_id(path)
        name = posixpath.splitext(found)[0]
    value = row[label] if label else None
    return Record(
        example_id=default if name is None else example_id(str(name)),
        label=value if isinstance(value, int) else None,
        data=data or b"",
        error="" if data else "the row has no image",
    )


def _folder(fs: Any, path: str, shard: Shard) -> Iterator[Record]:
    for file in sorted(map(str, fs.ls(path, detail=False))):
        if _is_image(file) and not posixpath.basename(file).startswith("."):
            relative = file.removeprefix(shard.root).lstrip("/")
            try:
                data, error = fs.cat_file(file), ""
            except OSError as wrong:
                data, error = b"", str(wrong)
            yield Record(example_id=example_id(relative), label=shard.label, data=data, error=error)


def _rest(shard: Shard, error: Exception) -> Record:
    return Record(
        example_id=f"{shard.name} (the rest)",
        label=None,
        data=b"",
        error=f"the shard ends early: {error}",
    )
