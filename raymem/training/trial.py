"""One trial on one device, no Ray: train a model on its subset, evaluate it on every example.

Shapes: N training and M test examples, n in the subset, B batch, K classes.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymem import models
from raymem.curvature import CurvatureRule
from raymem.errors import DivergedError, OutOfMemoryError, TrialError
from raymem.models import margins
from raymem.plan import Seeds
from raymem.privacy import Mechanism
from raymem.training.batched_curvature import Measured, measure_images
from raymem.training.checkpoint import Checkpoints
from raymem.training.epoch_curvature import EpochCurvature
from raymem.training.history import SubsetHistory
from raymem.training.images import Images, as_input
from raymem.training.loop import OnEpoch, train_alone
from raymem.training.precision import fast_arithmetic
from raymem.training.private import train_privately
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe


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
    """Wall seconds of training and evaluation, of a group its share; curvature's are in
    `curvature`."""
    how: str = "alone"
    """How it was computed: alone or in a group of how many models, step by step or as a CUDA
    graph. The trial is the same but for rounding."""
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
    subset_size: int | None = None,
    threads: int = 1,
    curvature: CurvatureRule | None = None,
    keep_weights: bool = False,
    mechanism: Mechanism | None = None,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
    graph: bool = True,
    on_epoch: OnEpoch = lambda epoch: None,
) -> TrialResult:
    """Train one model on the examples of `mask` (bool [N]) and evaluate it on every example.

    `subset_size` is the plan's, which says how many steps all trials take; by default it is the
    mask's own. With a `mechanism`, training is private, or its counterpart at epsilon inf. With
    `curvature`, every training example's is measured too, by probes of the trial's own, and while
    it trains if the rule averages over epochs. With
    `checkpoints`, training goes on from the last one. `ranks` says which of several workers this
    is; all of them call this with the same arguments, and get the same result. On a GPU the steps
    are replayed as a CUDA `graph` where the model can be captured.

    With the same arguments on the same CPU and versions the result is the same to the bit, whatever
    ran before in the process; nothing is left behind.

    Raises DivergedError, OutOfMemoryError, RecipeError for models that do not fit the images,
    PrivacyError for those that cannot be trained privately, and CurvatureError for those that
    cannot be differentiated as the rule says.
    """
    start = time.perf_counter()
    with by_itself(seeds.init, threads), out_of_memory_named():
        model = fresh_model(images, recipe)
        epochs = EpochCurvature.of(model, images, curvature, recipe, seed=seeds.init, ranks=ranks)
        how: Any = {
            "checkpoints": checkpoints, "ranks": ranks, "on_epoch": on_epoch, "epochs": epochs,
        }  # fmt: skip
        if mechanism is None:
            state = train_alone(
                model, images, mask, recipe, seeds, subset_size=subset_size, graph=graph, **how
            )
            history, computed = state.shown(), ", then ".join(state.how)
        else:
            history = train_privately(model, images, mask, recipe, seeds, mechanism, **how)
            computed = "alone"
        start += 0.0 if epochs is None else epochs.seconds
        return judge(
            model, images, recipe, seeds, history, computed,
            curvature=curvature, epochs=epochs, keep_weights=keep_weights, ranks=ranks,
            start=start,
        )  # fmt: skip


def fresh_model(images: Images, recipe: Recipe) -> nn.Module:
    """On the device, with weights from torch's global random state."""
    model = models.build_model(
        recipe.model,
        n_classes=images.n_classes,
        image_shape=images.image_shape,
        mean=recipe.mean,
        std=recipe.std,
    )
    return model.to(images.device)


def judge(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    seeds: Seeds,
    history: SubsetHistory,
    how: str,
    *,
    curvature: CurvatureRule | None,
    epochs: EpochCurvature | None,
    keep_weights: bool,
    ranks: Ranks,
    start: float,
) -> TrialResult:
    """What a trained model says of every example; its clock began at `start`."""
    train_side = evaluate(model, images.x_train, images.y_train, ranks=ranks)
    test_side = evaluate(model, images.x_test, images.y_test, ranks=ranks)
    seconds = time.perf_counter() - start
    weights = _on_cpu(model) if keep_weights else None
    measured = None
    if curvature is not None:
        measured = measure_images(model, images, curvature, recipe, seed=seeds.init, ranks=ranks)
        if epochs is not None:
            measured = epochs.with_last(measured)
    return TrialResult(
        train=train_side,
        test=test_side,
        history=history,
        seconds=seconds,
        how=how,
        curvature=measured,
        weights=weights,
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 512, ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluate `model` in eval mode and float32 on images x (uint8 [N, H, W, C]), labels y ([N]).

    Each of several `ranks` evaluates its share, and all have the whole result.

    Raises DivergedError if a logit is not finite, and TrialError if a second pass over the first
    batch gives something else: then the model still draws at random in eval mode.
    """
    model.eval()
    correct, margin = [], []
    finite = torch.ones((), dtype=torch.bool, device=y.device)
    n, share = len(x), ranks.part(len(x))
    x, y = x[share], y[share]
    for start in range(0, len(x), batch_size):
        labels = y[start : start + batch_size]
        part = x[start : start + batch_size].to(y.device)
        logits = model(as_input(part, torch.contiguous_format)).float()
        finite &= torch.isfinite(logits).all()
        if start == 0 and bool(finite):
            again = model(as_input(part, torch.contiguous_format)).float()
            if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3):
                raise TrialError(
                    "the model gives different logits for the same images in eval mode; switch its "
                    "randomness (dropout, sampling) off there"
                )
        correct.append(logits.argmax(1) == labels)
        margin.append(margins(logits, labels))
    # Once, at the end: asking waits for the device.
    if not bool(finite):
        raise DivergedError("the trained model gives logits that are not finite")
    none = y.new_zeros(0)
    return Evaluation(
        correct=ranks.all_gather(torch.cat([none.bool(), *correct]), n).cpu().numpy(),
        margin=ranks.all_gather(torch.cat([none.float(), *margin]), n).cpu().numpy(),
    )


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        name: t.detach().to("cpu", memory_format=torch.contiguous_format).clone()
        for name, t in state.items()
    }


@contextlib.contextmanager
def by_itself(seed: int, threads: int) -> Iterator[None]:
    """Seeded global random states, and fast arithmetic, put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with fast_arithmetic(threads), torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def out_of_memory_named() -> Iterator[None]:
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
