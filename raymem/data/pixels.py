"""Encoded images -> uint8 pixels, for readers, caches and streams; and the hash of pixels."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from raymem.errors import ExamplesError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Orientations in EXIF, and what brings images upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Some copies of ImageNet append the class to the name of the file.
ILSVRC = re.compile(r"(n\d{8}_\d+|ILSVRC2012_(?:val|test)_\d{8})(?:_n\d{8})?")
WNID = re.compile(r"n\d{8}")


def open_image(file: str | Path | IO[bytes], *, grey: bool) -> Image.Image:
    """A decoded image, upright, of mode L or RGB. Raises whatever Pillow raises for bad files."""
    with warnings.catch_warnings():
        # Pillow warns of images that it reads nevertheless: very large ones, odd metadata.
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ExamplesError(f"mode {opened.mode}: more than 8 bits per channel")
            opened.load()
            return _upright(opened).convert("L" if grey else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # metadata that cannot be read do not say that the image is turned
        return image
    return image if turn is None else image.transpose(turn)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part with the shape of `size` (H, W), resized to it, antialiased."""
    return ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)


def content_hash(image: NDArray[np.uint8]) -> str:
    """128 bits of SHA-256 over an image's shape (H, W, C) and pixels, as hexadecimal digits."""
    digest = hashlib.sha256(repr(tuple(int(side) for side in image.shape)).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


def example_id(path: str) -> str:
    """The id of an image at `path`, relative to its set: the path, but ILSVRC's names alone.

    >>> example_id("train/n01440764/n01440764_10026.JPEG")
    'n01440764_10026'
    >>> example_id("ILSVRC2012_val_00000293_n01440764.JPEG")
    'ILSVRC2012_val_00000293'
    >>> example_id("train/cat/7.png")
    'train/cat/7.png'
    """
    name = path.rpartition("/")[2]
    match = ILSVRC.fullmatch(name.partition(".")[0])
    return match[1] if match else path
