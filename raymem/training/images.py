"""The whole set as tensors, and batches of it: gathered, augmented and scaled on the device.

Pixels are on the device where they fit, else in the machine's memory or mapped from its disk; then
batches are gathered there and sent, the next one while the device works on one.

Shapes: N training and M test examples, B batch, H x W pixels, C channels, K classes.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.training.crops import random_boxes, resized_crops
from raymem.training.recipe import Recipe

# Of a device's free memory, what pixels may take; models and their batches need the rest.
SHARE_FOR_PIXELS = 0.4
AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Images:
    """The whole set as tensors, shared by all trials of the process."""

    x_train: Tensor
    """uint8 [N, H, W, C], on the device or on the CPU."""
    y_train: Tensor
    """int64 [N]."""
    x_test: Tensor
    """uint8 [M, H, W, C]."""
    y_test: Tensor
    """int64 [M]."""
    n_classes: int
    """K."""

    @classmethod
    def from_arrays(
        cls,
        x_train: NDArray[np.uint8],
        y_train: NDArray[np.int64],
        x_test: NDArray[np.uint8],
        y_test: NDArray[np.int64],
        n_classes: int,
        device: torch.device | str = "cpu",
        *,
        resident: bool | None = None,
    ) -> Images:
        """On the CPU the arrays are mapped, not copied, also when they are read-only.

        `resident` puts pixels on the device; by default if they take less than 40% of what is free
        there.
        """
        device = torch.device(device)
        if resident is None:
            resident = x_train.nbytes + x_test.nbytes <= _room_on(device)
        pixels_on = device if resident else torch.device("cpu")

        def tensor(array: NDArray[np.generic], on: torch.device) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                return torch.from_numpy(array).to(on)

        return cls(
            x_train=tensor(x_train, pixels_on),
            y_train=tensor(y_train, device),
            x_test=tensor(x_test, pixels_on),
            y_test=tensor(y_test, device),
            n_classes=n_classes,
        )

    def training_batches(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pixels of training examples, uint8 [B, H, W, C] on the device, for each `rows` [B].

        Where they have to be sent, a thread gathers the next few while one is used.
        """
        if self.x_train.device == self.device:
            for batch in rows:
                yield gather(self.x_train, batch.to(self.device))
            return
        yield from _ahead(self._sent(batch) for batch in rows)

    def _sent(self, rows: Tensor) -> Tensor:
        on_gpu = self.device.type == "cuda"
        return gather(self.x_train, rows, pinned=on_gpu).to(self.device, non_blocking=on_gpu)

    @property
    def device(self) -> torch.device:
        """Where trials are; labels are there too."""
        return self.y_train.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        H, W, C = self.x_train.shape[1:]
        return H, W, C


def gather(x: Tensor, rows: Tensor, *, pinned: bool = False) -> Tensor:
    """x[rows]: x uint8 [N, H, W, C] and rows int64 [B] on one device, rows in range.

    On the CPU whole images are copied at once, also from a mapped file: torch's indexing copies
    byte by byte. `pinned` memory there is memory that a GPU can read while the CPU goes on.

    >>> x = torch.arange(6, dtype=torch.uint8).reshape(3, 2, 1, 1)
    >>> gather(x, torch.tensor([2, 0])).flatten()
    tensor([4, 5, 0, 1], dtype=torch.uint8)
    """
    if x.device.type != "cpu":
        return x[rows]
    out = torch.empty((len(rows), *x.shape[1:]), dtype=x.dtype, pin_memory=pinned)
    # "clip" lets numpy write into `out` directly; to raise, it would have to keep a copy.
    np.take(x.numpy(), rows.numpy(), axis=0, out=out.numpy(), mode="clip")
    return out


def as_input(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """uint8 or float32 [B, H, W, C], 0 to 255 -> float32 [B, C, H, W] in [0, 1]."""
    images = x.permute(0, 3, 1, 2).to(torch.float32).contiguous(memory_format=memory_format)
    return images.div_(255) if x.dtype == torch.uint8 else images / 255


Draws = dict[str, Tensor]
"""How each image of a batch is augmented: `shift` or `box`, and `flip`, [B, ...] each."""


def draw_augmentation(
    B: int, recipe: Recipe, image_shape: tuple[int, int, int], draws: torch.Generator
) -> Draws:
    """Draw crops and flips for B images, from a CPU generator: they do not depend on the device."""
    H, W, _ = image_shape
    drawn: Draws = {}
    if recipe.crop_scale is not None:
        drawn["box"] = random_boxes(B, (H, W), recipe.crop_scale, recipe.crop_ratio, draws)
    elif recipe.crop_padding:
        p = recipe.crop_padding
        drawn["shift"] = torch.randint(-p, p + 1, (2, B), generator=draws).T.contiguous()
    if recipe.flip:
        drawn["flip"] = torch.rand(B, generator=draws) < 0.5
    return drawn


def take(x: Tensor, rows: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    """Images `rows` (int64 [B]) of x (uint8 [N, H, W, C]), cropped and flipped by their `draws`.

    uint8 [B, H, W, C]; resized crops are float32, 0 to 255. All tensors are on one device.
    """
    _, H, W, _ = x.shape
    if "box" in draws:
        return resized_crops(
            gather(x, rows), draws["box"], recipe.crop_size or H, draws.get("flip")
        )
    if not draws:
        return gather(x, rows)
    B = len(rows)
    row_at = torch.arange(H, device=x.device).expand(B, H)
    column_at = torch.arange(W, device=x.device).expand(B, W)
    if "shift" in draws:
        row_at = _reflect(row_at + draws["shift"][:, :1], H)
        column_at = _reflect(column_at + draws["shift"][:, 1:], W)
    if "flip" in draws:
        column_at = torch.where(draws["flip"][:, None], column_at.flip(1), column_at)
    # One gather instead of picking, padding, cropping and flipping in turn.
    return x[rows[:, None, None], row_at[:, :, None], column_at[:, None, :]]


def augment(
    x: Tensor,
    recipe: Recipe,
    draws: torch.Generator,
    *,
    part: slice = slice(None),
    of: int | None = None,
) -> Tensor:
    """Random crops and flips of a batch x (uint8 [B, H, W, C]), each image with its own draw.

    Where x is only a `part` of a batch of `of` images, they are drawn for the whole batch: an
    image's draw does not depend on how many workers share it.
    """
    H, W, C = x.shape[1:]
    drawn = draw_augmentation(len(x) if of is None else of, recipe, (H, W, C), draws)
    here = {name: values[part].to(x.device) for name, values in drawn.items()}
    return take(x, torch.arange(len(x), device=x.device), here, recipe)


def _reflect(at: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 come back mirrored at the edge pixel."""
    at = at.abs()
    return torch.where(at >= size, 2 * (size - 1) - at, at).clamp(0, size - 1)


def _room_on(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return SHARE_FOR_PIXELS * float(free)


def _ahead(items: Iterator[Tensor]) -> Iterator[Tensor]:
    """`items`, made by a thread a few ahead. Ends the thread when it is closed."""
    made: queue.Queue[Tensor | BaseException | None] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Tensor | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # raised where the batch is asked for
            put(error)

    thread = threading.Thread(target=make, name="raymem-batches", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def default_device() -> torch.device:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
