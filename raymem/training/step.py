"""One step over static buffers: the CPU calls it, a GPU replays it as a CUDA graph.

A `Feed` holds what the steps of a piece of training read and write, on the device; a step takes its
row of it, and moves on to the next. Nothing is sent, read back or decided on the host in between.

Shapes: S steps, G models, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raymem.training.batches import Batches
from raymem.training.checkpoint import Training
from raymem.training.history import History
from raymem.training.images import Draws, Images, as_input, take
from raymem.training.optimizer import Optimizer
from raymem.training.precision import autocast
from raymem.training.ranks import Ranks
from raymem.training.recipe import Recipe


class Feed:
    """Batches of S steps of G models, on the device, and what the steps show."""

    def __init__(self, S: int, G: int, B: int, device: torch.device) -> None:
        self.places = torch.zeros(S, G, B, dtype=torch.int64, device=device)
        """Places in each model's subset."""
        self.rows = torch.zeros_like(self.places)
        """Rows of the set."""
        self.passes = torch.zeros(S, G, B, dtype=torch.int32, device=device)
        self.draws: Draws = {}
        self.rates = torch.zeros(S, 3, device=device)
        self.loss = torch.zeros(S, G, B, device=device)
        self.right = torch.zeros(S, G, B, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        """The step to take next, counted from the first of the piece."""

    def load(
        self, models: Sequence[Batches], subsets: Sequence[Tensor], rates: Tensor, at: int
    ) -> None:
        """Another piece of training, from its step number `at` on."""
        S = len(rates)
        rows = [subset[batches.places] for subset, batches in zip(subsets, models, strict=True)]
        self.rows[:S].copy_(torch.stack(rows, 1))
        self.places[:S].copy_(torch.stack([batches.places for batches in models], 1))
        self.passes[:S].copy_(torch.stack([batches.passes for batches in models], 1))
        for name in models[0].draws:
            values = torch.stack([batches.draws[name] for batches in models], 1)
            if name not in self.draws:
                shape = (len(self.rows), *values.shape[1:])
                self.draws[name] = torch.zeros(shape, dtype=values.dtype, device=self.at.device)
            self.draws[name][:S].copy_(values)
        self.rates[:S].copy_(rates)
        self.at.fill_(at)

    def batch(self) -> tuple[Tensor, Draws, Tensor]:
        """Of the next step: rows [G, B], draws [G, B, ...], rates [3]."""

        def now(values: Tensor) -> Tensor:
            return values.index_select(0, self.at)[0]

        draws = {name: now(values) for name, values in self.draws.items()}
        return now(self.rows), draws, now(self.rates)

    def show(self, loss: Tensor, right: Tensor) -> None:
        """The end of a step: losses and what was right, [G, B]."""
        self.loss.index_copy_(0, self.at, loss[None].to(self.loss.dtype))
        self.right.index_copy_(0, self.at, right[None])
        self.at += 1

    def count(self, history: History, start: int, stop: int) -> None:
        """Add what the steps from `start` to `stop` of the piece showed to `history`."""
        if stop > start:
            of_each = (
                values[start:stop].transpose(0, 1).flatten(1)
                for values in (self.places, self.loss, self.right, self.passes)
            )
            history.follow(*of_each)


class SingleStep:
    """The steps of one model, on this worker's share of each batch."""

    def __init__(
        self, state: Training, images: Images, recipe: Recipe, ranks: Ranks, feed: Feed
    ) -> None:
        assert isinstance(state.optimizer, Optimizer)
        self.optimizer, self.scaler = state.optimizer, state.scaler
        self.images, self.recipe, self.ranks, self.feed = images, recipe, ranks, feed
        self.memory_format = memory_format_of(recipe)
        self.model = ranks.wrap(state.model)
        if recipe.compile:
            self.model = torch.compile(self.model)  # type: ignore[assignment]

    def __call__(self, pixels: Tensor | None = None) -> None:
        """One step. `pixels` (uint8 [B, H, W, C], the share's) are given where the set's are not on
        the device."""
        recipe, ranks = self.recipe, self.ranks
        rows, draws, rates = self.feed.batch()
        B = rows.shape[1]
        part = ranks.part(B)
        rows = rows[0, part]
        here = {name: values[0, part] for name, values in draws.items()}
        if pixels is None:
            x = take(self.images.x_train, rows, here, recipe)
        else:
            x = take(pixels, torch.arange(len(pixels), device=rows.device), here, recipe)
        y = self.images.y_train[rows]
        with autocast(rows.device, recipe):
            logits = self.model(as_input(x, self.memory_format))
        loss, objective = losses(logits, y, recipe)
        if not ranks.alone:
            # Gradients are averaged over workers, whose shares may differ by one example.
            objective = objective * (len(y) * ranks.world / B)
        self.optimizer.forget_gradients()
        self.scaler.scale(objective).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer, rates)  # type: ignore[arg-type]
        self.scaler.update()
        with torch.no_grad():
            # On all workers, so that each could write a checkpoint, and all diverge together.
            right = ranks.all_gather(logits.argmax(1) == y, B)
            self.feed.show(ranks.all_gather(loss.detach(), B)[None], right[None])


def losses(logits: Tensor, y: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Each example's cross entropy [B], and what is minimized."""
    loss = F.cross_entropy(logits.float(), y, reduction="none")
    smoothing = recipe.label_smoothing
    if smoothing:
        return loss, F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
    return loss, loss.mean()


def memory_format_of(recipe: Recipe) -> torch.memory_format:
    """Of images and weights."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format
