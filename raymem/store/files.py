"""Objects under one fsspec URL, with the two writes a store needs: create-if-absent and replace.

Both are atomic: a reader sees a whole object or none. On object stores create-if-absent is a
conditional put (fsspec's mode="create"); on local disks it is a synced temporary file and a hard
link, because fsspec's own local create can tear and can race.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import fsspec

from raymem.errors import StoreError, StoreFullError

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Files:
    """The objects below `url`, by keys relative to it such as "trials/eps-inf/000017.parquet".

    >>> files = Files("memory://doctest")
    >>> files.create("a/b.json", b"{}"), files.create("a/b.json", b"[]"), files.read("a/b.json")
    (True, False, b'{}')
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(os.fspath(url))
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"no file system for {url} ({error}); s3:// needs pip install 'raymem[s3]', "
                "gs:// needs 'raymem[gcs]'"
            ) from error
        self.local = "file" in _protocols(self.fs)
        self.root: str = str(Path(root).absolute()) if self.local else root.rstrip("/")

    @property
    def url(self) -> str:
        """The whole URL; a plain absolute path on local disks."""
        return self.root if self.local else str(self.fs.unstrip_protocol(self.root))

    def path(self, key: str) -> str:
        """The file system's own path of `key`."""
        return f"{self.root}/{key}"

    def create(self, key: str, data: bytes) -> bool:
        """Write `key` whole unless it is there; False if it is. Raises StoreFullError."""
        with _full_named(self.url):
            if self.local:
                return _create_local(Path(self.path(key)), data)
            try:
                self.fs.pipe_file(self.path(key), data, mode="create")
            except FileExistsError:
                return False
            return True

    def replace(self, key: str, data: bytes) -> None:
        """Write `key` whole, over what was there. Raises StoreFullError."""
        with _full_named(self.url):
            if not self.local:
                self.fs.pipe_file(self.path(key), data)
                return
            target = Path(self.path(key))
            with _temporary(target, data) as temporary:
                os.replace(temporary, target)
            _sync_folder(target.parent)

    def replace_with(self, key: str, write: Callable[[IO[bytes]], None]) -> None:
        """The same with what `write` writes to a local file: for objects too large for memory."""
        target = Path(self.path(key))
        with _full_named(self.url):
            if not self.local:
                with tempfile.NamedTemporaryFile() as file:
                    write(file)
                    file.flush()
                    self.fs.put_file(file.name, self.path(key))
                return
            with _temporary(target, write) as temporary:
                os.replace(temporary, target)
            _sync_folder(target.parent)

    def read(self, key: str) -> bytes:
        """The bytes of `key`. Raises FileNotFoundError."""
        data: bytes = self.fs.cat_file(self.path(key))
        return data

    def exists(self, key: str) -> bool:
        """Is there an object `key`, as of now?"""
        self.fs.invalidate_cache(self.path(key))
        return bool(self.fs.exists(self.path(key)))

    def list(self, prefix: str = "") -> list[str]:
        """All keys below the folder `prefix`, sorted; temporary files left out."""
        folder = f"{self.root}/{prefix}".rstrip("/")
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(folder)
        except FileNotFoundError:
            return []
        skip = len(self.root) + 1
        keys = (str(path)[skip:] for path in found)
        return sorted(key for key in keys if not key.rpartition("/")[2].startswith("."))

    def delete(self, key: str) -> None:
        """Remove `key`, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(key))

    def move(self, key: str, to: str) -> None:
        """Put `key` where `to` says."""
        self.replace(to, self.read(key))
        self.delete(key)

    def temporaries(self) -> Iterator[Path]:
        """What killed writers left behind on a local disk."""
        if self.local and Path(self.root).is_dir():
            yield from Path(self.root).rglob(".*.tmp")


def _create_local(target: Path, data: bytes) -> bool:
    if target.exists():
        return False
    with _temporary(target, data) as temporary:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # No hard links on this disk: rename would overwrite, so the last check is ours.
            if target.exists():
                return False
            os.rename(temporary, target)
    _sync_folder(target.parent)
    return True


@contextlib.contextmanager
def _temporary(target: Path, data: bytes | Callable[[IO[bytes]], None]) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network disks cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_named(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(
                f"no space left in {url}; free some, then run the same command again: what is "
                "committed is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise StoreError(f"cannot write to {url} ({error}); choose another --store") from error
        raise


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
