"""One trial on one device, no Ray: train a model on its subset, evaluate it on every example.

Shapes: N training and M test examples, n in the subset, B batch, K classes.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raymem import models
from raymem.curvature import CurvatureRule
from raymem.errors import DivergedError, OutOfMemoryError, TrialError
from raymem.models import margins
from raymem.plan import Seeds
from raymem.training.images import Images, as_input, augment
from raymem.training.measure import Measured, measure
from raymem.training.recipe import Recipe, learning_rate_factor

OnEpoch = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class SubsetHistory:
    """What training showed of each of the n examples of the subset, in their order.

    Measured on the augmented batches that trained the model, in training mode, as in Toneva et al.
    2019 (forgetting) and Ravikumar et al. 2025 (cumulative sample loss).
    """

    cumulative_loss: NDArray[np.float32]
    """[n] Sum over epochs of the cross entropy, nats."""
    learning_epoch: NDArray[np.int32]
    """[n] First epoch (from 1) from which on it was right at every later visit; 0: never."""
    forgetting_count: NDArray[np.int32]
    """[n] How often it was right at one visit and wrong at the next."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model in eval mode says of some examples."""

    correct: NDArray[np.bool_]
    """Is the largest logit the label's?"""
    margin: NDArray[np.float32]
    """log p_y - log of the sum of the other classes' p; p_y = sigmoid(margin)."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trained model, evaluated on every example."""

    train: Evaluation
    """Over all N training examples, in the subset or not."""
    test: Evaluation
    """Over all M test examples."""
    history: SubsetHistory
    """Over the n examples of the subset."""
    seconds: float
    """Wall seconds of training and evaluation; curvature's are in `curvature`."""
    curvature: Measured | None = None
    """Over all N training examples, if it was asked for."""
    weights: dict[str, Tensor] | None = None
    """The trained model's, on the CPU, if they were asked for."""


def run_trial(
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    *,
    threads: int = 1,
    curvature: CurvatureRule | None = None,
    keep_weights: bool = False,
    on_epoch: OnEpoch = lambda epoch: None,
) -> TrialResult:
    """Train one model on the examples of `mask` (bool [N]) and evaluate it on every example.

    With `curvature`, every training example's is measured too, by probes of the trial's own.

    With the same arguments on the same CPU and versions the result is the same to the bit, whatever
    ran before in the process; nothing is left behind.

    Raises DivergedError, OutOfMemoryError, RecipeError for models that do not fit the images, and
    CurvatureError for those that cannot be differentiated as the rule says.
    """
    start = time.perf_counter()
    with _alone(seeds.init, threads), _out_of_memory_named():
        model = models.build_model(
            recipe.model,
            n_classes=images.n_classes,
            image_shape=images.image_shape,
            mean=recipe.mean,
            std=recipe.std,
        ).to(images.device)
        history = train(model, images, mask, recipe, seeds, on_epoch=on_epoch)
        train_side = evaluate(model, images.x_train, images.y_train)
        test_side = evaluate(model, images.x_test, images.y_test)
        seconds = time.perf_counter() - start
        weights = _on_cpu(model) if keep_weights else None
        measured = None
        if curvature is not None:
            measured = measure(
                model,
                images.x_train,
                images.y_train,
                curvature,
                seed=seeds.init,
                channels_last=recipe.channels_last,
            )
    return TrialResult(
        train=train_side,
        test=test_side,
        history=history,
        seconds=seconds,
        curvature=measured,
        weights=weights,
    )


def train(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    *,
    on_epoch: OnEpoch = lambda epoch: None,
) -> SubsetHistory:
    """Train `model` in place on the examples of `mask` (bool [N]).

    Raises DivergedError after the first epoch with a loss that is not finite.
    """
    device = images.device
    subset = torch.from_numpy(np.flatnonzero(mask))
    n = len(subset)
    if n == 0:
        raise TrialError("the subset is empty; take a larger subset_ratio or more examples")
    batches_per_epoch = math.ceil(n / recipe.batch_size)
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format).train()
    optimizer = _optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    order = torch.Generator().manual_seed(seeds.order)
    draws = torch.Generator().manual_seed(seeds.augment)

    cumulative_loss = torch.zeros(n, device=device)
    was_right = torch.zeros(n, dtype=torch.bool, device=device)
    learning_epoch = torch.zeros(n, dtype=torch.int32, device=device)
    forgetting_count = torch.zeros(n, dtype=torch.int32, device=device)

    for epoch in range(recipe.epochs):
        right = torch.zeros_like(was_right)
        shuffled = torch.randperm(n, generator=order)
        # Equal batches: no example is left out, and none ends up in a batch of one.
        for number, batch in enumerate(shuffled.tensor_split(batches_per_epoch)):
            done = (epoch + number / batches_per_epoch) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, done)
            at = subset[batch].to(device)
            x = augment(images.x_train[at], recipe, draws)
            y = images.y_train[at]
            with _autocast(device, recipe):
                logits = model(as_input(x, memory_format))
            loss = F.cross_entropy(logits.float(), y, reduction="none")
            objective = loss.mean()
            if recipe.label_smoothing:
                objective = F.cross_entropy(
                    logits.float(), y, label_smoothing=recipe.label_smoothing
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(objective).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                place = batch.to(device)
                cumulative_loss[place] += loss.detach()
                right[place] = logits.argmax(1) == y
        forgetting_count += was_right & ~right
        learning_epoch[~right] = 0
        learning_epoch[right & ~was_right] = epoch + 1
        was_right = right
        if not torch.isfinite(cumulative_loss).all():
            raise DivergedError(
                f"the training loss was not finite in epoch {epoch + 1} of {recipe.epochs}; "
                "a smaller learning_rate or a warmup may help"
            )
        on_epoch(epoch + 1)
    return SubsetHistory(
        cumulative_loss=cumulative_loss.cpu().numpy(),
        learning_epoch=learning_epoch.cpu().numpy(),
        forgetting_count=forgetting_count.cpu().numpy(),
    )


@torch.inference_mode()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 512) -> Evaluation:
    """Evaluate `model` in eval mode and float32 on images x (uint8 [N, H, W, C]), labels y ([N]).

    Raises DivergedError if a logit is not finite, and TrialError if a second pass over the first
    batch gives something else: then the model still draws at random in eval mode.
    """
    model.eval()
    correct, margin = [], []
    for start in range(0, len(x), batch_size):
        part, labels = x[start : start + batch_size], y[start : start + batch_size]
        logits = model(as_input(part, torch.contiguous_format)).float()
        if not torch.isfinite(logits).all():
            raise DivergedError("the trained model gives logits that are not finite")
        if start == 0:
            again = model(as_input(part, torch.contiguous_format)).float()
            if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3):
                raise TrialError(
                    "the model gives different logits for the same images in eval mode; switch its "
                    "randomness (dropout, sampling) off there"
                )
        correct.append((logits.argmax(1) == labels).cpu().numpy())
        margin.append(margins(logits, labels).cpu().numpy())
    return Evaluation(correct=np.concatenate(correct), margin=np.concatenate(margin))


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        name: t.detach().to("cpu", memory_format=torch.contiguous_format).clone()
        for name, t in state.items()
    }


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


def _flushes_denormals() -> bool:
    """torch can set this state of the thread, but not tell it."""
    return bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 == 0)


@contextlib.contextmanager
def _alone(seed: int, threads: int) -> Iterator[None]:
    """Seeded global random states, threads and flushing of denormals, put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    threads_before = torch.get_num_threads()
    flushed_before = _flushes_denormals()
    torch.set_num_threads(threads)
    # Models that memorize drive gradients into denormals: 10 to 100 times slower on CPUs.
    torch.set_flush_denormal(True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(flushed_before)


@contextlib.contextmanager
def _out_of_memory_named() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; the CPU allocator has no exception of its own.
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            f"out of memory ({error}); take a smaller batch_size or model, or fewer trials at once"
        ) from error
