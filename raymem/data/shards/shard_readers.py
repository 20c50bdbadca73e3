"""Shards of encoded images: lists those at a URL, and reads one record by record.

A shard is a WebDataset tar, a Parquet file with encoded images as on Hugging Face, a folder of
images that are one class or a part of it, or a piece of a cache. Nothing is decoded here.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from raymem.data.array_checks import some
from raymem.data.cache import holds_cache
from raymem.data.pixels import IMAGE_SUFFIXES, example_id
from raymem.data.shards.pieces import list_pieces, read_piece
from raymem.data.shards.records import Kind, Record, Shard, parts
from raymem.errors import ExamplesError, StoreError, first_line
from raymem.retry import ask, is_local, open_fs, open_patiently

SUFFIXES: dict[str, Kind] = {
    ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".parquet": "parquet",
}  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls", "target", "class")
ID_COLUMNS = ("example_id", "id", "__key__", "key")
LABEL_MEMBERS = ("cls", "label", "index")
ROWS = 64
# Files of a folder on an object store that are fetched side by side.
FETCHED = 16
BLOCK, CHUNK = 512, 1 << 20
COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open,
}  # fmt: skip
CORRUPT = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


def list_shards(
    data: str, classes: Sequence[str] | None = None, *, n_classes: int | None = None
) -> list[Shard]:
    """The shards of a set: a tar or Parquet file, a pattern with *, a folder of such or of images,
    or a cache of `raymem ingest`.

    Folders of images are classes: numbered as in `classes`, which must have them all, or else in
    the order of their names, of which there must be `n_classes`, if that is given; large ones are
    cut into parts. Hidden files and folders are left out. Raises ExamplesError if there is nothing
    to read, or no one way to.
    """
    if holds_cache(data):
        return list_pieces(data)
    fs, files, root = list_files(data)
    hidden = re.compile(r"(^|/)\.")
    files = [file for file in files if not hidden.search(_below(file, root))]
    at = str(fs.unstrip_protocol(root))
    shards = [
        Shard(
            url=fs.unstrip_protocol(file),
            name=_below(file, root).removesuffix(suffix),
            kind=SUFFIXES[suffix],
            root=at,
        )
        for file in files
        if (suffix := _suffix(file)) is not None
    ]
    folders = _folders(fs, files, root, classes, n_classes)
    if shards and folders:
        raise ExamplesError(
            f"{data} has both {shards[0].url.rpartition('/')[2]} and folders of images; give a "
            "pattern or a folder that has one of them"
        )
    if not shards and not folders:
        what = "write the pattern with *, not with braces" if "{" in data else "check the URL"
        raise ExamplesError(
            f"there are no .tar, .parquet or image files at {data}; {what}, and give a file, a "
            "pattern, or a folder"
        )
    twice = [name for name, n in Counter(shard.name for shard in shards).items() if n > 1]
    if twice:
        raise ExamplesError(
            f"two shards at {data} are named {twice[0]}; give the tar and the Parquet files as two "
            "patterns"
        )
    return shards or folders


def list_files(data: str) -> tuple[AbstractFileSystem, list[str], str]:
    """The file system, the files at a URL in order, and the path they are relative to."""
    try:
        fs, path = open_fs(data)
        files, root = ask(fs, lambda: _listed(fs, path.rstrip("/")), data)
    except StoreError as error:
        raise ExamplesError(str(error)) from error
    except Exception as error:  # file systems raise many kinds
        raise ExamplesError(
            f"{data} cannot be listed ({first_line(error)}); check the path"
        ) from error
    return fs, files, root


def _listed(fs: AbstractFileSystem, path: str) -> tuple[list[str], str]:
    try:
        # fsspec's `isfile` answers no on any error.
        kind = fs.info(path)["type"]
    except (FileNotFoundError, NotADirectoryError):
        kind = None
    if kind == "file":
        return [path], posixpath.dirname(path)
    if kind == "directory":
        found = _walked(path) if is_local(fs) else map(str, fs.find(path))
        return sorted(found), path
    pattern = re.search(r"[*?\[]", path)
    if pattern is None:
        return [], path
    return sorted(map(str, fs.glob(path))), posixpath.dirname(path[: pattern.start()])


def _walked(folder: str) -> Iterator[str]:
    """All files below a local folder, through links too, which fsspec does not follow."""
    for at, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(at) + "/"
        # A link to one of its own parents would be followed endlessly.
        folders[:] = [
            f for f in folders if not here.startswith(os.path.realpath(f"{at}/{f}") + "/")
        ]
        yield from (f"{at}/{file}" for file in files)


def _below(file: str, root: str) -> str:
    return file.removeprefix(root).lstrip("/")


def _suffix(file: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), None)


def is_image(file: str) -> bool:
    return posixpath.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _folders(
    fs: AbstractFileSystem,
    files: Sequence[str],
    root: str,
    classes: Sequence[str] | None,
    n_classes: int | None,
) -> list[Shard]:
    folders = sorted({posixpath.dirname(file) for file in files if is_image(file)})
    names = sorted({posixpath.basename(folder) for folder in folders if folder != root})
    known = list(classes or names)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ExamplesError(
            f"the folders {some(unknown)} are no classes of the model, which are like "
            f"{some(known[:3])}; name folders as the model's classes"
        )
    if names and not classes and n_classes is not None and len(names) != n_classes:
        raise ExamplesError(
            f"there are {len(names)} folders of classes, such as {some(names[:3])}, and the model "
            f"has {n_classes} classes; which is which cannot be told: give a folder of all classes,"
            " or tars or Parquet with labels"
        )
    images: dict[str, list[str]] = {folder: [] for folder in folders}
    for file in files:
        if is_image(file):
            folder, _, name = file.rpartition("/")
            images[folder].append(name)
    return [
        part
        for folder in folders
        for part in parts(
            Shard(
                url=fs.unstrip_protocol(folder),
                name=_below(folder, root) or posixpath.basename(folder),
                kind="folder",
                # Images directly in the root have no class.
                label=None if folder == root else known.index(posixpath.basename(folder)),
                root=str(fs.unstrip_protocol(root)),
            ),
            images[folder],
        )
    ]


def read_shard(shard: Shard) -> Iterator[Record]:
    """The records of a shard, in its order. A shard that ends early ends with a record of error.

    Raises ExamplesError if a Parquet file has no column of encoded images.
    """
    if shard.kind == "cache":
        yield from read_piece(shard)
        return
    fs, path = open_fs(shard.url)
    readers = {"tar": _tar, "parquet": _parquet, "folder": _folder}
    yield from readers[shard.kind](fs, path, shard)


class _Stream:
    """A tar, decompressed, as tarfile reads it; knows its length and last byte that is not 0."""

    def __init__(self, file: IO[bytes]) -> None:
        magic = file.read(6)
        file.seek(0)
        opener = next((o for start, o in COMPRESSED.items() if magic.startswith(start)), None)
        # These check sums and ends, which tarfile's own decompression does not.
        self._file: Any = opener(file) if opener else file
        self.length = self.used = 0

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data: bytes = self._file.read(size)
        kept = len(data.rstrip(b"\0"))
        if kept:
            self.used = self.length + kept
        self.length += len(data)
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.read(CHUNK):
            pass


def _tar(fs: AbstractFileSystem, path: str, shard: Shard) -> Iterator[Record]:
    key, members = None, list[tuple[str, bytes | None]]()
    with open_patiently(fs, path) as file:
        try:
            stream = _Stream(file)
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    folder, _, name = _printable(member.name).rpartition("/")
                    if not (member.isfile() or member.islnk()) or name.startswith("."):
                        continue
                    stem, _, extension = name.partition(".")
                    this = f"{folder}/{stem}" if folder else stem
                    if this != key:
                        yield from _of_members(key, members)
                        key, members = this, []
                    content = None if member.islnk() else tar.extractfile(member)
                    members.append((extension.lower(), content.read() if content else None))
            stream.drain()
        except CORRUPT as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the network or the disk, not the file
            # The last one is whole if its label is there.
            yield from (record for record in _of_members(key, members) if record.label is not None)
            yield _rest(shard, first_line(error))
            return
    yield from _of_members(key, members)
    if stream.used > tar.offset:
        yield _rest(shard, "a damaged header, or another archive, follows its end")
    elif stream.length < tar.offset + BLOCK:
        yield _rest(shard, "its end-of-archive mark is missing")


def _printable(name: str) -> str:
    """The name with surrogates escaped: tables cannot hold names that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _of_members(key: str | None, members: Sequence[tuple[str, bytes | None]]) -> Iterator[Record]:
    """The record of the members that share a key; none without an image."""
    images = [(n, data) for n, data in members if f".{n.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    # Beside key.jpg there may be key.seg.png and the like.
    plain = [image for image in images if "." not in image[0]] or images
    if key is None or not images:
        return
    label, error = None, ""
    if len(plain) > 1:
        error = f"{len(plain)} images have this key (keys end at the first dot of a name)"
    elif plain[0][1] is None:
        error = "its image is a hard link to another member"
    try:
        by_name = {name: data or b"" for name, data in members}
        for name in LABEL_MEMBERS:
            if name in by_name:
                label = int(by_name[name])
        if label is None and "json" in by_name:
            about = json.loads(by_name["json"])
            label = next((int(about[name]) for name in LABEL_COLUMNS if name in about), None)
    except (ValueError, TypeError) as wrong:
        error = error or f"its label is no number ({wrong})"
    yield Record(example_id=example_id(key), label=label, data=plain[0][1] or b"", error=error)


def _parquet(fs: AbstractFileSystem, path: str, shard: Shard) -> Iterator[Record]:
    number = 0
    try:
        with open_patiently(fs, path) as file:
            parquet = pq.ParquetFile(file)
            image, label, identity = _columns(parquet.schema_arrow, shard)
            wanted = [name for name in (image, label, identity) if name]
            for batch in parquet.iter_batches(ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    yield _of_row(row, image, label, identity, f"{shard.name}-{number:06d}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the network or the disk, not the file
        yield _rest(shard, first_line(error))


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
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise ExamplesError(
            f"{shard.url}: the column {label} is {schema.field(label).type}; labels must be "
            "integers, 0 to K-1"
        )
    ids = [name for name in ID_COLUMNS if name in schema.names]
    identity = next((name for name in ids if _names(schema.field(name).type)), None)
    return names[0], label, identity


def _names(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    )


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
        error="the row has no image" if data is None else "",
    )


def _folder(fs: AbstractFileSystem, path: str, shard: Shard) -> Iterator[Record]:
    files = [f"{path}/{name}" for name in shard.files] or [
        file
        for file in sorted(map(str, ask(fs, lambda: fs.ls(path, detail=False), shard.url)))
        if is_image(file) and not posixpath.basename(file).startswith(".")
    ]
    labels = shard.labels or [shard.label] * len(files)
    # A file that cannot be fetched is the network's or the disk's fault: no bad image.
    for file, label, data in zip(files, labels, _contents(fs, files, shard.url), strict=True):
        relative = _below(str(fs.unstrip_protocol(file)), shard.root)
        yield Record(example_id=example_id(relative), label=label, data=data)


def _contents(fs: AbstractFileSystem, files: Sequence[str], url: str) -> Iterator[bytes]:
    if is_local(fs):
        yield from map(fs.cat_file, files)
        return

    def fetch(file: str) -> bytes:
        data: bytes = ask(fs, partial(fs.cat_file, file), url)
        return data

    with ThreadPoolExecutor(FETCHED) as pool:
        for start in range(0, len(files), 4 * FETCHED):
            yield from pool.map(fetch, files[start : start + 4 * FETCHED])


def _rest(shard: Shard, why: str) -> Record:
    return Record(
        example_id=f"{shard.name} (the rest)",
        label=None,
        data=b"",
        error=f"the shard ends early: {why}",
    )
