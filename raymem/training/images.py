"""The whole set as tensors, and batches of it: gathered, augmented and scaled on the device.

Shapes: N training and M test examples, B batch, H x W pixels, C channels, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Images:
    """The whole set as tensors on one device, shared by all trials of the process."""

    x_train: Tensor
    """uint8 [N, H, W, C]."""
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
    ) -> Images:
        """On the CPU the arrays are mapped, not copied, also when they are read-only."""

        def tensor(array: NDArray[Any]) -> Tensor:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                return torch.from_numpy(array).to(device)

        return cls(
            x_train=tensor(x_train),
            y_train=tensor(y_train),
            x_test=tensor(x_test),
            y_test=tensor(y_test),
            n_classes=n_classes,
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors, and the trials, are."""
        return self.x_train.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        H, W, C = self.x_train.shape[1:]
        return H, W, C


def as_input(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [0, 1]."""
    images = x.permute(0, 3, 1, 2).to(torch.float32).contiguous(memory_format=memory_format)
    return images.div_(255)


def augment(x: Tensor, recipe: Recipe, draws: torch.Generator) -> Tensor:
    """Random crops and flips of a batch x (uint8 [B, H, W, C]), each image with its own draw.

    Draws come from a CPU generator, so they do not depend on the device.
    """
    B, H, W, _ = x.shape
    if recipe.crop_padding == 0 and not recipe.flip:
        return x
    row_at = torch.arange(H).expand(B, H)
    column_at = torch.arange(W).expand(B, W)
    if recipe.crop_padding:
        p = recipe.crop_padding
        shift = torch.randint(-p, p + 1, (2, B, 1), generator=draws)
        row_at = _reflect(row_at + shift[0], H)
        column_at = _reflect(column_at + shift[1], W)
    if recipe.flip:
        flipped = torch.rand(B, 1, generator=draws) < 0.5
        column_at = torch.where(flipped, column_at.flip(1), column_at)
    # One gather instead of padding, cropping and flipping in turn.
    image = torch.arange(B, device=x.device)[:, None, None]
    return x[image, row_at[:, :, None].to(x.device), column_at[:, None, :].to(x.device)]


def _reflect(at: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 come back mirrored at the edge pixel."""
    at = at.abs()
    return torch.where(at >= size, 2 * (size - 1) - at, at).clamp(0, size - 1)


def default_device() -> torch.device:
    """cuda where there is one, else mps, else cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
