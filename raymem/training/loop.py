"""The training loop: one model, its subset, batch after batch, on one worker or several.

Shapes: N training examples, n in the subset, B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raymem.errors import DivergedError, TrialError
from raymem.plan import Seeds
from raymem.training.checkpoint import Checkpoints, Training
from raymem.training.images import Images, as_input, augment
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe, learning_rate_factor

OnEpoch = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class SubsetHistory:
    """What training showed of each of the n examples of the subset, in their order.

    Measured on the augmented batches that trained the model, in training mode, as in Toneva et al.
    2019 (forgetting) and Ravikumar et al. 2025 (cumulative sample loss).
    """

    cumulative_loss: NDArray[np.float32]
    """[n] Sum over visits of the cross entropy, nats; one visit an epoch, in private training one
    on average."""
    learning_epoch: NDArray[np.int32]
    """[n] First epoch (from 1) from which on it was right at every later visit; 0: never."""
    forgetting_count: NDArray[np.int32]
    """[n] How often it was right at one visit and wrong at the next."""


def train(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    *,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
    on_epoch: OnEpoch = lambda epoch: None,
) -> SubsetHistory:
    """Train `model` in place on the examples of `mask` (bool [N]), each once an epoch, shuffled.

    Goes on from the last of `checkpoints`, if there is one, and saves others when they are due.
    Several `ranks` each take their share of every batch: order and augmentation do not depend on
    how many they are, nor do gradients but for rounding, unless layers look at a whole batch:
    BatchNorm takes the statistics of each worker's share.

    Raises DivergedError after the first epoch with a loss that is not finite.
    """
    state, subset = start(model, images, mask, recipe, seeds)
    if not ranks.alone:
        # Dropout must not draw the same on all workers.
        torch.manual_seed(seeds.init + ranks.rank)
    restore(state, checkpoints, ranks)
    step = _Step(state, images, recipe, ranks)
    batches_per_epoch = math.ceil(state.n / recipe.batch_size)
    while state.epoch < recipe.epochs:
        # Equal batches: no example is left out, and none ends up in a batch of one.
        batches = state.start_epoch().tensor_split(batches_per_epoch)[state.batch :]
        for batch, x in zip(batches, step.pixels(subset, batches), strict=True):
            done = (state.epoch + state.batch / batches_per_epoch) / recipe.epochs
            step(batch, subset[batch], x, done)
            state.batch += 1
            if checkpoints is not None and ranks.rank == 0 and checkpoints.due():
                checkpoints.save(state.as_bytes())
        check_finite(state, recipe)
        state.end_epoch()
        on_epoch(state.epoch)
    return history_of(state)


def start(
    model: nn.Module, images: Images, mask: NDArray[np.bool_], recipe: Recipe, seeds: Seeds
) -> tuple[Training, Tensor]:
    """The state before the first batch, and the rows of the subset, int64 [n]."""
    subset = torch.from_numpy(np.flatnonzero(mask))
    if len(subset) == 0:
        raise TrialError("the subset is empty; take a larger subset_ratio or more examples")
    model.to(memory_format=memory_format_of(recipe)).train()
    state = Training(
        model,
        _optimizer(model, recipe),
        torch.amp.GradScaler(images.device.type, enabled=recipe.precision == "float16"),
        len(subset),
        seeds.order,
        seeds.augment,
    )
    return state, subset


def history_of(state: Training) -> SubsetHistory:
    """What training showed."""
    return SubsetHistory(
        cumulative_loss=state.cumulative_loss.cpu().numpy(),
        learning_epoch=state.learning_epoch.cpu().numpy(),
        forgetting_count=state.forgetting_count.cpu().numpy(),
    )


def check_finite(state: Training, recipe: Recipe) -> None:
    """Raises DivergedError if a loss was not finite."""
    if not torch.isfinite(state.cumulative_loss).all():
        raise DivergedError(
            f"the training loss was not finite in epoch {state.epoch + 1} of {recipe.epochs}; "
            "a smaller learning_rate or a warmup may help"
        )


def memory_format_of(recipe: Recipe) -> torch.memory_format:
    """Of images and weights."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Of all parameters, when the fraction `done` of training is over."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, done)


def restore(state: Training, checkpoints: Checkpoints | None, ranks: Ranks) -> Any:
    """From rank 0's checkpoint on all ranks: another could have read a later one."""
    if checkpoints is None:
        return None
    data = ranks.share(checkpoints.load() if ranks.rank == 0 else None)
    return None if data is None else state.restore(data, ranks.rank)


class _Step:
    """One batch after the other, on this worker's share of each."""

    def __init__(
        self,
        state: Training,
        images: Images,
        recipe: Recipe,
        ranks: Ranks,
    ) -> None:
        self.state, self.images, self.recipe, self.ranks = state, images, recipe, ranks
        self.memory_format = memory_format_of(recipe)
        self.model = ranks.wrap(state.model)
        if recipe.compile:
            self.model = torch.compile(self.model)  # type: ignore[assignment]

    def pixels(self, subset: Tensor, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The pixels of this worker's share of each batch."""
        shares = (subset[batch][self.ranks.part(len(batch))] for batch in batches)
        return self.images.training_batches(shares)

    def __call__(self, batch: Tensor, rows: Tensor, x: Tensor, done: float) -> None:
        """Train on one batch: places in the subset and rows of the set, [B]; x is the share's."""
        state, recipe, ranks = self.state, self.recipe, self.ranks
        device, B = self.images.device, len(batch)
        part = ranks.part(B)
        set_learning_rate(state.optimizer, recipe, done)
        y = self.images.y_train[rows[part].to(device)]
        x = augment(x, recipe, state.draws, part=part, of=B)
        with _autocast(device, recipe):
            logits = self.model(as_input(x, self.memory_format))
        loss = F.cross_entropy(logits.float(), y, reduction="none")
        smoothing = recipe.label_smoothing
        objective = (
            F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
            if smoothing
            else loss.mean()
        )
        if not ranks.alone:
            # Gradients are averaged over workers, whose shares may differ by one example.
            objective = objective * (len(y) * ranks.world / B)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(objective).backward()  # type: ignore[no-untyped-call]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        with torch.no_grad():
            place = batch.to(device)
            # On all workers, so that each could write a checkpoint, and all diverge together.
            right = ranks.spread(logits.argmax(1) == y, B)
            state.visit(place, ranks.spread(loss.detach(), B), right)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), momentum=recipe.momentum, nesterov=recipe.nesterov, **common
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **common)


def _autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return torch.autocast(
        device.type, dtype=dtype[recipe.precision], enabled=recipe.precision != "float32"
    )
