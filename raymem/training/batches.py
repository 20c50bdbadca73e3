"""One trial's order of examples and its augmentation draws, made ahead on the CPU.

Both come from the trial's own generators: they depend on its seeds and on its subset, not on the
device, nor on which other models train beside it.

Shapes: n examples in the subset, S steps, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raymem.training.images import Draws, draw_augmentation
from raymem.training.recipe import Recipe, Steps

# Images whose order and draws are in memory at once: an epoch of small sets, a part of large ones.
IMAGES_AHEAD = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Steps whose batches are drawn together: an epoch, or a part of it."""

    start: int
    stop: int
    """The first step after it."""
    epoch: int
    """From 1."""
    last: bool
    """Is the epoch over after it?"""


def pieces(steps: Steps) -> Iterator[Piece]:
    """All steps of a trial, in their order."""
    most = max(1, IMAGES_AHEAD // steps.batch)
    for epoch in range(1, steps.epochs + 1):
        start, end = steps.end(epoch - 1), steps.end(epoch)
        for at in range(start, end, most):
            stop = min(at + most, end)
            yield Piece(start=at, stop=stop, epoch=epoch, last=stop == end)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What one model is trained on in the steps of a piece."""

    places: Tensor
    """int64 [S, B]: places in the subset."""
    passes: Tensor
    """int32 [S, B]: which visit of its example this is, from 1."""
    draws: Draws
    """[S, B, ...] each."""


class Stream:
    """Shuffled passes over n examples, one after the other without end, cut into batches."""

    def __init__(self, n: int, order_seed: int, augment_seed: int) -> None:
        self.n = n
        self.order = torch.Generator().manual_seed(order_seed)
        """Shuffles, one permutation a pass; or draws Poisson batches."""
        self.draws = torch.Generator().manual_seed(augment_seed)
        """Draws crops and flips."""
        self._before = self.order.get_state()
        """The state of `order` before the permutation in use."""
        self._rest = torch.zeros(0, dtype=torch.int64)
        """What is left of that permutation."""
        self.mark()

    def mark(self) -> None:
        """Keep where the stream is now, for a checkpoint."""
        order = self._before if len(self._rest) else self.order.get_state()
        self.marked = {"order": order, "draws": self.draws.get_state(), "left": len(self._rest)}

    def go_to(self, marked: dict[str, Tensor | int]) -> None:
        """Go on from where another stream of the same trial was marked."""
        order, draws, left = (marked[name] for name in ("order", "draws", "left"))
        assert isinstance(order, Tensor)
        assert isinstance(draws, Tensor)
        self.order.set_state(order)
        self.draws.set_state(draws)
        self._before, self._rest = order, self._rest[:0]
        if left:
            self._rest = torch.randperm(self.n, generator=self.order)[self.n - int(left) :]
        self.mark()

    def batches(
        self, piece: Piece, batch: int, recipe: Recipe, image_shape: tuple[int, int, int]
    ) -> Batches:
        """Of the next piece; the stream is marked at its beginning."""
        self.mark()
        S = piece.stop - piece.start
        parts, missing = [self._rest], S * batch - len(self._rest)
        while missing > 0:
            self._before = self.order.get_state()
            parts.append(torch.randperm(self.n, generator=self.order))
            missing -= self.n
        stream = torch.cat(parts)
        self._rest = stream[S * batch :].clone()
        position = torch.arange(piece.start * batch, piece.stop * batch)
        drawn = draw_augmentation(S * batch, recipe, image_shape, self.draws)
        return Batches(
            places=stream[: S * batch].view(S, batch),
            passes=(position // self.n + 1).to(torch.int32).view(S, batch),
            draws={
                name: values.view(S, batch, *values.shape[1:]) for name, values in drawn.items()
            },
        )
