"""Object stores as they are: which of their errors pass by themselves, and how long to wait.

`patiently` is the one place that tries again, `is_transient` the one that says what is worth it.
Neither imports s3fs, gcsfs or adlfs, which are optional: their errors are told by the answer's
status and code, and by the names of their classes. Local disks are none of this module's business.

s3:// runs in tests, against a server on the same machine; gs:// and az:// share the code, not run.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem

from raymem.errors import RaymemError, StoreError, StoreFullError, first_line

PATIENCE = 60.0
"""Seconds after which no further try is begun."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 8.0
# Tries of each request inside botocore: enough for one part of a large object, and few, because
# they multiply with the tries here.
TRIES_WITHIN = 3

STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
# Answers whose status does not say that they pass. An upload in parts whose last answer was lost is
# not there any more when it is ended again.
CODES = {
    "SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
    "NoSuchUpload",
}  # fmt: skip
FULL_CODES = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"}
NAMES = {
    "ConnectionError", "TimeoutError",  # of Python, botocore and requests
    "HTTPClientError", "ResponseParserError", "FlexibleChecksumError",  # botocore
    "CredentialRetrievalError", "MetadataRetrievalError",  # a node's credentials are late
    "ClientConnectionError", "ClientPayloadError", "IncompleteRead",  # aiohttp, urllib3
    "TransportError", "ChecksumError",  # gcsfs and google-auth
    "ServiceRequestError", "ServiceResponseError", "IncompleteReadError",  # adlfs
}  # fmt: skip
DENIED = {
    "PermissionError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound",
    "NoAuthTokenError", "TokenRetrievalError", "RefreshError", "DefaultCredentialsError",
    "ClientAuthenticationError",
}  # fmt: skip
# What callers ask about: answers, not faults.
ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, RaymemError)

# Kept, as fsspec does until there is a fork: a child that dropped one would close its parent's
# connections.
OPENED: dict[int, object] = {}

T = TypeVar("T")


def open_fs(url: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path on it. Raises StoreError where none is installed.

    It caches no listings, so that other processes' writes are seen at once, and leaves trying again
    to `patiently`.
    """
    url = os.fspath(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url))
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"no file system for {url} ({error}); s3:// needs pip install 'raymem[s3]', gs:// "
            "needs 'raymem[gcs]'"
        ) from error
    if url.startswith(("s3:", "s3a:")):
        fs.retries = 1  # this instance is ours: no other has these options
    OPENED[id(fs)] = fs
    return fs, str(path)


def _options(url: str) -> dict[str, object]:
    protocol, found, _ = url.partition("://")
    if not found or "::" in url or protocol in ("file", "local"):
        return {}
    options: dict[str, object] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"retries": {"total_max_attempts": TRIES_WITHIN}, **given}
    return options


def is_local(fs: AbstractFileSystem) -> bool:
    """Is this a disk of this machine, or one that looks so?"""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol))


def ask(fs: AbstractFileSystem, call: Callable[[], T], url: str) -> T:
    """`call()`, patiently unless `fs` is local: errors of a disk are raised as they are."""
    return call() if is_local(fs) else patiently(call, url)


def patiently(call: Callable[[], T], url: str) -> T:
    """`call()`, again as long as it fails with what passes by itself, for PATIENCE seconds.

    Raises StoreError if it does not pass, and at once if access is denied or the store cannot be
    used; what is found or not found is raised as it is.

    >>> patiently(lambda: 17, "s3://bucket/study")
    17
    """
    end, wait = time.monotonic() + PATIENCE, FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:  # file systems raise many kinds
            pause = random.SystemRandom().uniform(wait / 2, wait)
            if is_transient(error):
                if time.monotonic() + pause > end:
                    raise StoreError(
                        f"{url} does not answer, for {PATIENCE:g} s now ({_said(error)}); run the "
                        "same command again: what is committed is kept"
                    ) from error
            elif isinstance(error, ANSWERS):
                raise
            else:
                raise _named(error, url) from error
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)


def _named(error: Exception, url: str) -> StoreError:
    if error_code(error) in FULL_CODES or 507 in _statuses(error):
        return StoreFullError(
            f"no space left in {url}; free some, then run the same command again: what is "
            "committed is kept"
        )
    if _names(error) & DENIED or {401, 403} & _statuses(error):
        return StoreError(
            f"no access to {url} ({_said(error)}); check the credentials, and that they allow to "
            "list, read, write and delete there"
        )
    return StoreError(
        f"{url} cannot be used ({_said(error)}); check the URL, and the endpoint and region in the "
        "environment"
    )


def is_transient(error: BaseException) -> bool:
    """Does this pass by itself: throttling, a broken connection, a server in trouble?

    >>> is_transient(TimeoutError()), is_transient(PermissionError()), is_transient(OSError(28, ""))
    (True, False, False)
    """
    if error_code(error) in CODES:
        return True
    if isinstance(error, (*ANSWERS, PermissionError)):
        return False
    return bool(_statuses(error) & STATUSES or _names(error) & NAMES)


def error_code(error: BaseException) -> str:
    """The code of the answer that was translated into this error, such as "SlowDown"; or ""."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _statuses(error: BaseException) -> set[int]:
    found: set[int] = set()
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            metadata = response.get("ResponseMetadata", {})
            values = [metadata.get("HTTPStatusCode")]
        else:  # aiohttp, azure, gcsfs
            values = [getattr(one, name, None) for name in ("status", "status_code", "code")]
        found |= {int(value) for value in values if str(value).isdecimal()}
    return found


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


class PatientFile(io.RawIOBase):
    """A file open for reading on an object store, each read of which is patient."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`, or as much of it as is left."""
        # A read that fails has not moved the position.
        data = patiently(lambda: self._file.read(len(buffer)), self._url)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Let go of it."""
        self._file.close()
        super().close()


def open_patiently(fs: AbstractFileSystem, path: str) -> IO[bytes]:
    """`path` open for reading, patiently unless it is local. Raises FileNotFoundError."""
    if is_local(fs):
        return fs.open(path, "rb")  # type: ignore[no-any-return]
    url = str(fs.unstrip_protocol(path))
    file = patiently(lambda: fs.open(path, "rb"), url)
    return io.BufferedReader(PatientFile(file, url))
