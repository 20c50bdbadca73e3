"""From a record to the pixels that a model wants, uint8 [H, W, C], without normalization; or why
there are none."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raymem.data.pixels import fit, open_image
from raymem.data.shards.records import Record
from raymem.errors import ExamplesError, first_line

# A strip of one pixel by thousands would fill the memory when its short side is resized.
MOST_PIXELS = 100_000_000
# Larger labels are not class numbers, and int64 columns cannot hold the largest.
LARGEST_LABEL = 2**31
Way = Literal["fit", "crop", "squash"]
Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How a model wants its pixels. Comes with the model; normalization is inside the model.

    >>> PAPER.resize, PAPER.size
    (256, (224, 224))
    """

    size: tuple[int, int]
    """(H, W) of the result."""
    way: Way = "crop"
    """crop: the short side to `resize`, then the centre, as timm and torchvision do. fit: the
    largest centred part, resized, as raymem makes its own sets. squash: resized to `size` as is."""
    resize: int | None = None
    """Short side before the crop; None: the larger of `size`."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Pillow's filters, antialiased."""
    grey: bool = False
    """One channel instead of three."""

    @property
    def values(self) -> int:
        """Number of values in one image."""
        return self.size[0] * self.size[1] * (1 if self.grey else 3)

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Decode and transform. Raises whatever Pillow raises for images that cannot be read."""
        image = open_image(io.BytesIO(data), grey=self.grey)
        if self.way == "fit":
            image = fit(image, self.size)
        elif self.way == "squash":
            image = image.resize(self.size[::-1], self._filter())
        else:
            image = self._crop(image)
        pixels = np.asarray(image, np.uint8)
        return pixels[:, :, None] if self.grey else pixels

    def _crop(self, image: Image.Image) -> Image.Image:
        short = self.resize or max(self.size)
        if short < max(self.size):
            raise ExamplesError(f"resize {short} is smaller than the crop {self.size}")
        width, height = image.size
        if width <= height:
            wanted = (short, int(short * height / width))
        else:
            wanted = (int(short * width / height), short)
        if wanted[0] * wanted[1] > MOST_PIXELS:
            raise ExamplesError(f"{width}x{height} would become {wanted[0]}x{wanted[1]} pixels")
        if image.size != wanted:
            image = image.resize(wanted, self._filter())
        top = round((wanted[1] - self.size[0]) / 2)
        left = round((wanted[0] - self.size[1]) / 2)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, to be recorded and compared."""
        return {**dataclasses.asdict(self), "size": list(self.size)}


# The paper's and the published scorers' transform of ImageNet.
PAPER = Transform(size=(224, 224), resize=256, interpolation="bilinear")


def of_timm(config: dict[str, Any]) -> Transform:
    """The evaluation transform of timm's data config of a model. Raises ExamplesError."""
    _, H, W = config["input_size"]
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (H != W and mode == "center"):
        raise ExamplesError(
            f"timm's transform of this model (crop_mode {mode}, {H}x{W}) has no equal here; give "
            "--transform paper"
        )
    return Transform(
        size=(H, W),
        way="crop" if mode == "center" else "squash",
        resize=int(np.floor(H / config["crop_pct"])),
        interpolation=config["interpolation"],
    )


def decode(
    record: Record, transform: Transform, n_classes: int
) -> tuple[NDArray[np.uint8] | None, str]:
    """The pixels, or why there are none. Raises ExamplesError; see `pixels_of`."""
    if record.error:
        return None, record.error
    error = label_error(record.label, n_classes)
    return (None, error) if error else pixels_of(record, transform)


def label_error(label: int | None, n_classes: int) -> str:
    """Why a label is invalid in a set with `n_classes` classes; "" if it is valid."""
    if label is None:
        return "it has no label"
    return "" if 0 <= label < n_classes else f"label {label} is none of the {n_classes} classes"


def pixels_of(record: Record, transform: Transform) -> tuple[NDArray[np.uint8] | None, str]:
    """A record's pixels, whatever its label, or why there are none.

    Raises ExamplesError if the record is a cache's, of another size than the transform's.
    """
    if record.error:
        return None, record.error
    wanted = (*transform.size, 1 if transform.grey else 3)
    if record.pixels is not None:
        if record.pixels.shape != wanted:
            there, here = ("x".join(map(str, s)) for s in (record.pixels.shape, wanted))
            raise ExamplesError(
                f"the cache's images are {there}, the model wants {here}; take a model of that "
                "size, or ingest the set again with another --size"
            )
        return record.pixels, ""
    if not record.data:
        return None, "its image is empty"
    try:
        return transform(record.data), ""
    except UnidentifiedImageError:
        return None, "no image format that Pillow knows"
    except ExamplesError as error:
        return None, first_line(error)
    except Exception as error:  # Pillow raises many kinds
        return None, f"{type(error).__name__}: {first_line(error)}"
