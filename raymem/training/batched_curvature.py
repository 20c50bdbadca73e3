"""Curvature of many examples, batch by batch: what trials store and shards are scored with.

Shapes: N examples, B batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymem.curvature import (
    CHECKED,
    COMPARED,
    CurvatureRule,
    Mode,
    PrecisionChoice,
    input_curvature,
    paper_score,
    pick_mode,
    pick_precision,
)
from raymem.curvature.fold_batchnorm import folded
from raymem.errors import CurvatureError
from raymem.training.images import Images, as_input
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe
from raymem.training.replay import Replayed

# Values in a batch of images: 85 images of 32x32, 8 of 224x224.
BATCH_VALUES, SMALLEST_BATCH, LARGEST_BATCH = 2**18, 8, 256
# On a GPU batches are as large as this share of its free memory allows: others may train on it.
SHARE_OF_MEMORY, LARGEST_ON_GPU = 0.25, 512


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Curvature of N examples under one model, and the cheap baselines beside it."""

    values: dict[str, NDArray[np.float32]] = field(repr=False)
    """[N] each: curvature (tr H), curvature_stderr, curvature_squared (tr H^2), gradient_norm,
    loss, curvature_paper unless the rule leaves it out, and curvature_over_training if the rule
    asks for it."""
    mode: Mode
    """How the trace was computed."""
    precision: PrecisionChoice
    """In which arithmetic, and what that was chosen by."""
    seconds: float
    """Wall time."""
    epochs: int = 1
    """Models that curvature_over_training is the mean of: one for each epoch that was measured."""
    epochs_seconds: float = 0.0
    """Wall time of measuring under those before the last."""


class Meter:
    """Measures batches of uint8 images with one model, which is prepared once.

    BatchNorm is folded into convolutions where that gives the same logits. Results do not depend on
    the batches. Raises CurvatureError as `curvature` does.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        rule: CurvatureRule,
        *,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        """x (uint8 [N, H, W, C]) and y (int64 [N]): some examples, to choose mode, precision and
        batches with.

        Labels are where the model is; pixels may be elsewhere.
        """
        self.rule, self.seed = rule, seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        few = as_input(x[:CHECKED].to(y.device), self.memory_format)
        # What the model is, is asked of the model itself; folding adds rounding.
        self.mode: Mode = (
            pick_mode(model, few, y[:CHECKED], seed=seed) if rule.mode == "auto" else rule.mode
        )
        self.model = folded(model, few)
        forced = dataclasses.replace(rule, mode=self.mode)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:COMPARED]
        self.precision = pick_precision(
            self.model,
            as_input(x[some.to(x.device)].to(y.device), self.memory_format),
            y[some.to(y.device)],
            forced,
            seed=seed,
        )
        self.rule = dataclasses.replace(forced, precision=self.precision.precision)
        self._graph: _Graph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One batch: x uint8 [B, H, W, C], y int64 [B]; [B] each, halved where memory is short."""
        try:
            images = as_input(x, self.memory_format)
            if self._graph is not None and self._graph.fits(images):
                return self._graph(images, y)
            return self._measure(images, y)
        except torch.OutOfMemoryError:
            if len(x) == 1:
                raise
        half = len(x) // 2
        first, second = self(x[:half], y[:half]), self(x[half:], y[half:])
        return {name: torch.cat([first[name], second[name]]) for name in first}

    def all(self, x: Tensor, y: Tensor, batch_size: int) -> dict[str, NDArray[np.float32]]:
        """Any number of images, x uint8 [N, H, W, C] and y int64 [N], in batches; [N] each."""
        if self._graph is None and y.is_cuda:
            self._graph = _Graph(self._measure, batch_size)
        parts = [
            self(x[at : at + batch_size].to(y.device), y[at : at + batch_size])
            for at in range(0, len(x), batch_size)
        ]
        return {
            name: torch.cat([part[name] for part in parts]).to(torch.float32).cpu().numpy()
            for name in parts[0]
        }

    def batch_size(self, x: Tensor, y: Tensor) -> int:
        """How many of these images to measure at once: on a GPU, what its memory has room for."""
        if not y.is_cuda:
            return batch_of(x[0].numel())
        few = slice(0, SMALLEST_BATCH)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(y.device)
        torch.cuda.reset_peak_memory_stats(y.device)
        self(x[few].to(y.device), y[few])
        each = (torch.cuda.max_memory_allocated(y.device) - before) / len(x[few])
        free, _ = torch.cuda.mem_get_info(y.device)
        return int(np.clip(SHARE_OF_MEMORY * free / each, SMALLEST_BATCH, LARGEST_ON_GPU))

    def _measure(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        rule = self.rule
        found = input_curvature(self.model, images, y, rule, seed=self.seed)
        values = {
            "curvature": found.trace,
            "curvature_stderr": found.trace_stderr,
            "curvature_squared": found.squared,
            "gradient_norm": found.gradient_norm,
            "loss": found.loss,
        }
        if rule.paper is not None:
            score = paper_score(self.model, images, y, rule.paper, seed=self.seed)
            values["curvature_paper"] = score
        return values


class _Graph:
    """A function of whole batches on a GPU, replayed as a CUDA graph after the first few."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], dict[str, Tensor]], batch_size: int
    ) -> None:
        self._function, self._size = function, batch_size
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._found: dict[str, Tensor] = {}
        self._replayed = Replayed(self._step)

    def fits(self, images: Tensor) -> bool:
        """Is it a whole batch?"""
        return len(images) == self._size

    def __call__(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self._x is None or self._y is None:
            self._x, self._y = images.clone(), y.clone()
        self._x.copy_(images)
        self._y.copy_(y)
        self._replayed()
        return {name: values.clone() for name, values in self._found.items()}

    def _step(self) -> None:
        assert self._x is not None
        assert self._y is not None
        self._found = self._function(self._x, self._y)


def batch_of(image_values: int) -> int:
    """How many images of so many values fit a batch of moderate memory.

    >>> [batch_of(side * side * 3) for side in (8, 32, 64, 224)]
    [256, 85, 21, 8]
    """
    return int(np.clip(BATCH_VALUES // image_values, SMALLEST_BATCH, LARGEST_BATCH))


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rule: CurvatureRule | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    channels_last: bool = False,
    part: slice = slice(None),
) -> Measured:
    """Curvature of images x (uint8 [N, H, W, C]) with labels y (int64 [N]) under `model`.

    The model is put into eval mode. Of a `part` of the images only; how the trace is computed is
    chosen by the first of them all. Raises CurvatureError as `curvature` does, also without images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> found = measure(net, torch.zeros(5, 2, 2, 1, dtype=torch.uint8), torch.arange(5) % 3)
    >>> found.mode, found.values["curvature"].shape
    ('gauss-newton', (5,))
    """
    if len(x) == 0:
        raise CurvatureError("there is no image to measure; give one or more")
    start = time.perf_counter()
    meter = Meter(
        model.eval(), x, y, rule or CurvatureRule(), seed=seed, channels_last=channels_last
    )
    values = meter.all(x[part], y[part], batch_size or meter.batch_size(x, y))
    return Measured(
        values=values,
        mode=meter.mode,
        precision=meter.precision,
        seconds=time.perf_counter() - start,
    )


def measure_images(
    model: nn.Module,
    images: Images,
    rule: CurvatureRule,
    recipe: Recipe,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> Measured:
    """`measure` over all training images of a set; each of several `ranks` measures its share."""
    n = len(images.y_train)
    measured = measure(
        model,
        images.x_train,
        images.y_train,
        rule,
        seed=seed,
        channels_last=recipe.channels_last,
        part=ranks.part(n),
    )
    values = {
        name: ranks.all_gather(torch.from_numpy(found).to(images.device), n).cpu().numpy()
        for name, found in measured.values.items()
    }
    return dataclasses.replace(measured, values=values)
