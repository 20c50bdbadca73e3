"""Arrays from untrusted files. Code in a file is never run.

Numeric arrays are read as numpy reads them without pickles. Object arrays, which are pickles, are
read by an unpickler that knows arrays and byte strings and refuses all else.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from raymem.errors import ImportFileError

# What a pickled array of byte strings or texts needs, by any numpy.
HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def array_of(path: Path) -> np.ndarray:
    """The array of an .npy file. Raises ImportFileError if there is none, or it holds objects."""
    try:
        with path.open("rb") as file:
            return _array(file, str(path))
    except OSError as error:
        raise ImportFileError(
            f"{path} cannot be read ({error.strerror}); check the path"
        ) from error


@contextmanager
def laid_out(path: Path, format: str) -> Iterator[None]:
    """Raise ImportFileError for any error in reading files that do not have the expected layout."""
    try:
        yield
    except ImportFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ImportFileError(
            f"{path} is not laid out as {format} files are ({type(error).__name__}: {error}); "
            "check the format, or copy it again"
        ) from error


def numbers(array: np.ndarray, ndim: int, what: str) -> np.ndarray:
    """The array, if it has numbers in `ndim` dimensions. Raises ImportFileError."""
    if array.dtype.kind not in "biuf" or array.ndim != ndim:
        raise ImportFileError(
            f"{what} has {array.dtype} of shape {array.shape}; it must be numbers in {ndim} "
            f"dimension{'s' if ndim > 1 else ''}"
        )
    return array


def whole_numbers(array: np.ndarray, what: str, below: float = np.inf) -> NDArray[np.int64]:
    """[n] whole numbers from 0, all less than `below`. Raises ImportFileError for others."""
    a = numbers(array, 1, what)
    if not ((a >= 0) & (a < below) & (a == np.floor(a))).all():
        least = "" if np.isinf(below) else f" to {below - 1:,}"
        raise ImportFileError(f"{what} must be whole numbers from 0{least}")
    return a.astype(np.int64)


def truths(array: np.ndarray, ndim: int, what: str) -> NDArray[np.bool_]:
    """True and false, or 0 and 1, in `ndim` dimensions. Raises ImportFileError for others."""
    found = numbers(array, ndim, what)
    if found.dtype != bool and not np.isin(found, (0, 1)).all():
        raise ImportFileError(f"{what} must be true or false, got other {found.dtype} values")
    return found.astype(bool)


def truths_in(path: Path) -> NDArray[np.bool_]:
    """The booleans in an .npy file. Raises ImportFileError for values other than 0 and 1."""
    return truths(array_of(path), 1, str(path))


def mapped(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped, so that only what is used is read. Raises as
    `array_of`."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ImportFileError(
            f"{path} cannot be read ({error.strerror or error}); check the path"
        ) from error
    except (ValueError, EOFError) as error:
        raise ImportFileError(
            f"{path} is no array that is safe to read ({error}); save it anew with plain numbers, "
            "without pickle, or copy it again"
        ) from error
    return found


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises ImportFileError as `array_of` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                name.removesuffix(".npy"): _array(io.BytesIO(archive.read(name)), f"{path}: {name}")
                for name in archive.namelist()
            }
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        what = getattr(error, "strerror", None) or error
        raise ImportFileError(
            f"{path} cannot be read as an .npz file ({what}); check the path, or copy it again"
        ) from error


def _array(file: IO[bytes], what: str) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if not dtype.hasobject:
            file.seek(0)
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
        found = _Harmless(file).load()
        if not isinstance(found, np.ndarray) or found.shape != shape:
            raise ValueError("its header does not match its size")
        if not all(isinstance(value, (bytes, str)) for value in found.flat):
            raise ValueError("its objects are not text")
        return np.array([as_text(value) for value in found.flat]).reshape(shape)
    except (ValueError, EOFError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise ImportFileError(
            f"{what} is no array that is safe to read ({error}); save it anew with plain numbers "
            "or text, without pickle"
        ) from error


def as_text(value: object) -> str:
    """A name from a file, bytes or text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
