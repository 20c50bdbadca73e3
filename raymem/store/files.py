"""Objects under one fsspec URL, with the two writes a store needs: create-if-absent and replace.

Both are atomic: a reader sees a whole object or none. On object stores create-if-absent is a
conditional put (fsspec's mode="create"), and what fails for a while is tried again; on local disks
it is a synced temporary file and a hard link, because fsspec's own local create can tear and race.
`read_ahead` reads the next few objects while the one before is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from fsspec import AbstractFileSystem

from raymem.errors import StoreError, StoreFullError
from raymem.retry import ask, error_code, is_local, open_fs, patiently

T = TypeVar("T")
Key = TypeVar("Key")
Value = TypeVar("Value")
# Number of objects that are read at once.
AHEAD = 8
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)
PROVEN: set[str] = set()
"""URLs at which this process saw create-if-absent refuse a second create."""


class Files:
    """The objects below `url`, by keys relative to it such as "trials/eps-inf/000017.parquet".

    >>> files = Files("memory://doctest")
    >>> files.create("a/b.json", b"{}"), files.create("a/b.json", b"[]"), files.read("a/b.json")
    (True, False, b'{}')
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._given, self._process = url, os.getpid()
        self._fs, root = open_fs(url)
        self.local = is_local(self._fs)
        self.root: str = str(Path(root).absolute()) if self.local else root.rstrip("/")

    @property
    def fs(self) -> AbstractFileSystem:
        """The fsspec file system."""
        if self._process != os.getpid():  # connections belong to the parent after a fork
            self._process, (self._fs, _) = os.getpid(), open_fs(self._given)
        return self._fs

    @property
    def url(self) -> str:
        """The whole URL; a plain absolute path on local disks."""
        return self.root if self.local else str(self.fs.unstrip_protocol(self.root))

    def path(self, key: str) -> str:
        """The file system's own path of `key`."""
        return f"{self.root}/{key}"

    def create(self, key: str, data: bytes) -> bool:
        """Write `key` whole unless it is there; False if it is. Raises StoreFullError.

        On object stores True also if it is there with the same bytes: then an earlier attempt wrote
        it, and only the answer was lost.
        """
        if self.local:
            with _disk_errors(self.url):
                return _create_local(Path(self.path(key)), data)
        self._prove_create()
        return self._create_object(key, data)

    def replace(self, key: str, data: bytes) -> None:
        """Write `key` whole, over what was there. Raises StoreFullError."""
        if not self.local:
            self._put(lambda: self.fs.pipe_file(self.path(key), data))
            return
        target = Path(self.path(key))
        with _disk_errors(self.url):
            with _temporary(target, data) as temporary:
                os.replace(temporary, target)
            _sync_folder(target.parent)

    def replace_with(self, key: str, write: Callable[[IO[bytes]], None]) -> None:
        """Replace `key` by the contents of a local file that `write` fills, for objects larger than
        memory."""
        if not self.local:
            with tempfile.NamedTemporaryFile() as file:
                write(file)
                file.flush()
                self._put(lambda: self.fs.put_file(file.name, self.path(key)))
            return
        target = Path(self.path(key))
        with _disk_errors(self.url):
            with _temporary(target, write) as temporary:
                os.replace(temporary, target)
            _sync_folder(target.parent)

    def read(self, key: str) -> bytes:
        """The bytes of `key`. Raises FileNotFoundError."""
        data: bytes = self._ask(lambda: self.fs.cat_file(self.path(key)))
        return data

    def read_end(self, key: str, size: int) -> bytes:
        """The last `size` bytes of `key`, or all if it has fewer. Raises FileNotFoundError."""
        data: bytes = self._ask(lambda: self.fs.cat_file(self.path(key), start=-size))
        return data

    def size(self, key: str) -> int:
        """Bytes of `key`. Raises FileNotFoundError."""
        return int(self._ask(lambda: self.fs.info(self.path(key))["size"]))

    def exists(self, key: str) -> bool:
        """Is there an object `key`, as of now?"""
        try:
            # On some file systems fsspec's `exists` answers no on any error.
            self._ask(lambda: self.fs.info(self.path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """All keys below the folder `prefix`, sorted; temporary files left out."""
        folder = f"{self.root}/{prefix}".rstrip("/")
        try:
            found = self._ask(lambda: self.fs.find(folder))
        except FileNotFoundError:
            return []
        skip = len(self.root) + 1
        keys = (str(path)[skip:] for path in found)
        return sorted(key for key in keys if not key.rpartition("/")[2].startswith("."))

    def delete(self, key: str) -> None:
        """Remove `key`, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm_file(self.path(key)))

    def move(self, key: str, to: str) -> None:
        """Move an object from `key` to `to`."""
        self.replace(to, self.read(key))
        self.delete(key)

    def temporaries(self) -> Iterator[Path]:
        """Temporary files of killed writers on a local disk."""
        if self.local and Path(self.root).is_dir():
            yield from Path(self.root).rglob(".*.tmp")

    def _ask(self, call: Callable[[], T]) -> T:
        return ask(self.fs, call, self.url)

    def _put(self, call: Callable[[], T]) -> T:
        try:
            return patiently(call, self.url)
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no bucket for {self.url}; make it, or choose another --store"
            ) from error

    def _create_object(self, key: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self.fs.pipe_file(self.path(key), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # Servers other than Amazon's do not say which condition failed.
                if error_code(error) not in ("PreconditionFailed", "412"):
                    raise
                return False
            return True

        if self._put(put):
            return True
        try:
            return self.read(key) == data
        except FileNotFoundError:
            return False

    def _prove_create(self) -> None:
        """Check once per process that create-if-absent holds: some servers overwrite."""
        if self.url in PROVEN:
            return
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            if not self._create_object(probe, b"first") or self._create_object(probe, b"second"):
                raise StoreError(
                    f"{self.url} overwrites objects that are to be created only if they are absent,"
                    " so that trials could be lost; choose a --store whose server honours "
                    "If-None-Match on PUT (and s3fs, gcsfs or adlfs of 2025 or later)"
                )
        finally:
            self.delete(probe)
        PROVEN.add(self.url)


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
            # No hard links on this disk, and rename would overwrite: check once more.
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
def _disk_errors(url: str) -> Iterator[None]:
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


def read_ahead(
    keys: Iterable[Key], read: Callable[[Key], Value], ahead: int = AHEAD
) -> Iterator[tuple[Key, Value]]:
    """Each key with `read(key)`, in order; threads read the next few. Raises what `read` does.

    >>> list(read_ahead([1, 2, 3], lambda k: k * k, ahead=2))
    [(1, 1), (2, 4), (3, 9)]
    """
    waiting: deque[tuple[Key, Future[Value]]] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="raymem-read") as pool:
        for key in keys:
            waiting.append((key, pool.submit(read, key)))
            if len(waiting) == ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for key, future in waiting:
            yield key, future.result()
