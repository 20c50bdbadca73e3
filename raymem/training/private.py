"""Training under a mechanism: a fixed number of steps, each on a Poisson batch of the subset.

Shapes: N training examples, n in the subset, B batch.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raymem.errors import PrivacyError
from raymem.models import ModelFunction, build_model
from raymem.plan import Seeds
from raymem.privacy import (
    Mechanism,
    PerExample,
    PrivateSteps,
    check_frozen,
    check_function,
    check_private,
    frozen_state,
    physical_batches,
    poisson_batch,
)
from raymem.training.checkpoint import Checkpoints
from raymem.training.epoch_curvature import EpochCurvature
from raymem.training.history import SubsetHistory
from raymem.training.images import Images, as_input, augment
from raymem.training.loop import OnEpoch, check_finite, restore, start_with
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe, learning_rate_factor
from raymem.training.step import memory_format_of


def train_privately(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    mechanism: Mechanism,
    *,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
    epochs: EpochCurvature | None = None,
    on_epoch: OnEpoch = lambda epoch: None,
) -> SubsetHistory:
    """Train `model` in place on the examples of `mask` (bool [N]) by the steps of `mechanism`.

    At epsilon inf: the same batches and steps without clipping and noise. An epoch is its share of
    the steps. Goes on from the last of `checkpoints`, not in secure mode.

    Raises DivergedError after the first epoch with a loss that is not finite, and PrivacyError for
    recipes that cannot be trained so and for models that mix the examples of a batch, before
    training or after it: then the epsilon would be wrong, and no result is returned.
    """
    check_private_recipe(recipe, ranks.world)
    mode = None
    if mechanism.clips:
        mode = _tested_mode(recipe.model, images.n_classes, images.image_shape)
    frozen = frozen_state(model)
    memory_format = memory_format_of(recipe)
    model.to(memory_format=memory_format).train()
    # opacus wraps torch's own.
    optimizer = torch_optimizer(model, recipe)
    state, subset = start_with(model, optimizer, images, mask, recipe, seeds, epochs)
    stream = state.stream
    private = PrivateSteps(model, optimizer, mechanism, seeds.noise, mode=mode)
    if mechanism.secure_mode:
        stream.order.seed()
        checkpoints = None
    elif (saved := restore(state, checkpoints, ranks)) is not None:
        private.restore(saved)
    while private.steps < mechanism.steps:
        state.epoch = private.steps * recipe.epochs // mechanism.steps
        done = private.steps / mechanism.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(recipe, done)
        places = poisson_batch(state.n, mechanism.sample_rate, stream.order)
        rows = subset[places]
        # Drawn for the whole batch: an image's crop does not depend on how batches are cut.
        x = augment(next(iter(images.training_batches([rows]))), recipe, stream.draws)
        y, place = images.y_train[rows.to(images.device)], places.to(images.device)
        for part in physical_batches(places, private.batch):
            loss, right = private.add(
                as_input(x[part], memory_format), y[part], smoothing=recipe.label_smoothing
            )
            state.history.visit(place[part][None], loss[None], right[None], state.epoch + 1)
        private.step()
        # Where the next step's batch is drawn from.
        stream.mark()
        for _ in range(state.epoch, private.steps * recipe.epochs // mechanism.steps):
            check_finite(state.history, state.epoch + 1, recipe)
            state.end_epoch()
            state.measure()
            on_epoch(state.epoch)
        # After the epoch's end, which a resumed trial does not come to again.
        if checkpoints is not None and checkpoints.due():
            checkpoints.save(state.as_bytes(private.state()))
    private.close()
    if mechanism.clips:
        # What fresh weights do not show, trained ones may.
        check_frozen(model, frozen)
        check_function(model, images.image_shape)
    return state.shown()


def torch_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch.optim's own, as `recipe` says."""
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), momentum=recipe.momentum, nesterov=recipe.nesterov, **common
        )
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop,
    }  # fmt: skip
    return kinds[recipe.optimizer](model.parameters(), **common)


@functools.lru_cache(maxsize=16)
def _tested_mode(
    model: str | ModelFunction, n_classes: int, image_shape: tuple[int, int, int]
) -> PerExample:
    """How to take per-example gradients of this model: tested once in a process."""
    with torch.random.fork_rng(devices=[]):
        fresh = build_model(model, n_classes=n_classes, image_shape=image_shape)
        return check_private(fresh, image_shape)


def check_private_recipe(recipe: Recipe, workers: int = 1) -> None:
    """Raises PrivacyError for what private training does not do."""
    wrong = [
        message
        for bad, message in (
            (recipe.precision != "float32", f"precision {recipe.precision}"),
            (recipe.compile, "compile"),
            (workers > 1, f"{workers} workers per trial"),
        )
        if bad
    ]
    if wrong:
        raise PrivacyError(
            f"private training does not go with {' and '.join(wrong)}; train in float32, not "
            "compiled, with one worker per trial: batches are cut to fit its memory"
        )
