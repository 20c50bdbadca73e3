"""What one trial would take here: timed whole, or, of large sets, from a few images.

Shapes: N training and M test examples, n in the subset.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymem.data import Examples
from raymem.fleet.worker import TrialOptions
from raymem.plan import Plan
from raymem.store import TrialKey, trial_table
from raymem.store.trials import encode
from raymem.training import (
    Evaluation,
    Images,
    Member,
    Recipe,
    SubsetHistory,
    TrialResult,
    default_device,
    fast_arithmetic,
    models_per_step,
    run_group,
    run_trial,
)

# Images that stand for a large set, and the batches they are trained in.
SAMPLE, SAMPLE_BATCH = 64, 32
KEY = TrialKey(math.inf, 0)


def timed_trial(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    options: TrialOptions,
    *,
    threads: int,
    epsilon: float = math.inf,
) -> tuple[float, int]:
    """Seconds and bytes of trial 0 at `epsilon`, which is trained and not kept."""
    images, mask = _images(examples), plan.mask(0)
    # The first trial of a process pays for loading kernels.
    warm_up = dataclasses.replace(recipe, epochs=1)
    how: dict[str, Any] = {"subset_size": plan.subset_size, "threads": threads}
    run_trial(images, mask, warm_up, plan.seeds(0), **how)
    start = time.perf_counter()
    asked = options.of(TrialKey(epsilon, 0))
    result = run_trial(images, mask, recipe, plan.seeds(0), **how, **asked)
    seconds = time.perf_counter() - start
    return seconds, len(encode(trial_table(KEY, mask, result), {}))


def group_size(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    options: TrialOptions,
    *,
    threads: int,
    asked: int | None = None,
) -> int:
    """How many trials a worker on this device would train in one step; `asked` is the user's."""
    if options.mechanisms:
        return 1
    if asked is not None:
        return asked
    images = _images(examples)
    with fast_arithmetic(threads):
        return models_per_step(images, recipe, plan.subset_size)


def timed_group(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    options: TrialOptions,
    *,
    threads: int,
    models: int,
) -> tuple[float, int]:
    """Seconds a trial, and bytes, of the first `models` trials, trained in one step and not kept.

    Raises what a trial of them failed of.
    """
    members = []
    for trial in range(models):
        asked = options.of(TrialKey(math.inf, trial))
        members.append(
            Member(
                mask=plan.mask(trial),
                seeds=plan.seeds(trial),
                curvature=asked["curvature"],
                keep_weights=asked["keep_weights"],
            )
        )
    images = _images(examples)
    start = time.perf_counter()
    outcomes = run_group(images, members, recipe, subset_size=plan.subset_size, threads=threads)
    seconds = time.perf_counter() - start
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    first = outcomes[0]
    assert isinstance(first, TrialResult)
    return seconds / models, len(encode(trial_table(KEY, plan.mask(0), first), {}))


def _images(e: Examples) -> Images:
    return Images.from_arrays(
        e.x_train, e.y_train, e.x_test, e.y_test, e.n_classes, default_device()
    )


def estimated_trial(
    examples: Examples,
    plan: Plan,
    recipe: Recipe,
    options: TrialOptions,
    *,
    threads: int,
    epsilon: float = math.inf,
) -> tuple[float, int]:
    """The same from SAMPLE random images of the set's size: none of its own is read.

    Training of one epoch and evaluation are timed apart and counted up; so is curvature, if trials
    measure it. Bytes are those of a trial whose values are as unlike each other as can be.
    """
    N, M = len(examples.train_ids), len(examples.test_ids)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (SAMPLE, *examples.image_shape), np.uint8)
    y = rng.integers(0, examples.n_classes, SAMPLE)
    images = Images.from_arrays(x, y, x, y, examples.n_classes, default_device())
    everything = np.ones(SAMPLE, bool)
    asked = options.of(TrialKey(epsilon, 0))

    def seconds(epochs: int, **more: object) -> float:
        batch = min(SAMPLE_BATCH, recipe.batch_size)
        small = dataclasses.replace(recipe, epochs=epochs, batch_size=batch)
        if asked["mechanism"] is not None:
            more["mechanism"] = dataclasses.replace(
                asked["mechanism"],
                expected_batch=batch,
                sample_rate=batch / SAMPLE,
                steps=max(1, epochs * SAMPLE // batch),
            )
        start = time.perf_counter()
        run_trial(images, everything, small, plan.seeds(0), threads=threads, **more)  # type: ignore[arg-type]
        return time.perf_counter() - start

    seconds(1)
    one = seconds(1)
    epoch = max(0.0, seconds(2) - one)
    curvature = asked["curvature"]
    measuring = 0.0 if curvature is None else max(0.0, seconds(1, curvature=curvature) - one)
    if curvature is not None and curvature.every_epochs is not None:
        trace = dataclasses.replace(curvature, paper=None, every_epochs=None)
        more_epochs = math.ceil(recipe.epochs / curvature.every_epochs) - 1
        measuring += more_epochs * max(0.0, seconds(1, curvature=trace) - one)
    per_epoch, per_evaluated, per_measured = (
        part / SAMPLE for part in (epoch, max(0.0, one - epoch) / 2, measuring)
    )
    total = per_epoch * plan.subset_size * recipe.epochs + per_evaluated * (N + M)
    return total + per_measured * N, _bytes(plan.mask(0), M, recipe.epochs, rng)


def _bytes(mask: NDArray[np.bool_], M: int, epochs: int, rng: np.random.Generator) -> int:
    """Of a trial object of this size."""

    def evaluation(size: int) -> Evaluation:
        margin = rng.normal(2, 3, size).astype(np.float32)
        return Evaluation(correct=margin > 0, margin=margin)

    n = int(mask.sum())
    history = SubsetHistory(
        cumulative_loss=rng.gamma(2, 2, n).astype(np.float32),
        learning_epoch=rng.integers(0, epochs + 1, n).astype(np.int32),
        forgetting_count=rng.poisson(1, n).astype(np.int32),
    )
    result = TrialResult(
        train=evaluation(len(mask)), test=evaluation(M), history=history, seconds=0.0
    )
    return len(encode(trial_table(KEY, mask, result), {}))
