"""How one model is trained: `Recipe`, its steps, and its learning rate at each of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from raymem import models
from raymem.errors import RecipeError

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained. Part of a study's identity: another recipe is another study.

    Every trial of a study takes the same steps (`Steps`), however many examples are in its subset:
    batches of exactly `batch_size` examples are cut from an endless stream of shuffled passes over
    the subset, so that a batch may hold the end of one pass and the beginning of the next, and the
    number of visits differs by one at most between examples. The number of steps is that of
    `epochs` passes over a subset of the plan's nominal size.

    Raises RecipeError for settings that make no sense.

    >>> Recipe(model="mlp-512-256", epochs=10, learning_rate=0.1).batch_size
    128
    """

    model: str | models.ModelFunction
    """A name, "module:function", or a function of n_classes and image_shape (see models.py)."""
    epochs: int
    """Passes over a subset of the nominal size."""
    batch_size: int = 128
    """Examples of each step; the nominal size of a subset where that is smaller."""
    optimizer: OptimizerName = "sgd"
    """torch.optim's; RMSprop without momentum, not centred, as is its default there."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """SGD's Nesterov variant."""
    weight_decay: float = 0.0
    """L2 penalty (sgd, adam, rmsprop) or decoupled decay (adamw)."""
    schedule: Literal["constant", "linear", "cosine", "steps"] = "cosine"
    """From the peak to zero (linear, cosine), or divided by ten at each of `milestones`."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """For `steps`: fractions of training."""
    warmup: float = 0.0
    """Fraction of training in which the learning rate rises linearly from zero."""
    label_smoothing: float = 0.0
    """Cross entropy's; recorded losses are without it."""
    crop_padding: int = 0
    """Random crops after reflecting this many pixels at each edge; 0 is none."""
    flip: bool = False
    """Random horizontal flips."""
    crop_scale: tuple[float, float] | None = None
    """Random resized crops: least and most of an image's area; None: none. Evaluation is always of
    whole images."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Their least and most width over height."""
    crop_size: int | None = None
    """The side they are resized to; None: the height of the images."""
    compile: bool = False
    """torch.compile the model for training."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Of training's matrix products and convolutions. float32 is float32, also where torch's
    settings allow less; tf32 is float32 with products of 10-bit mantissas, on GPUs that have them;
    the other two keep weights in float32 (mixed precision). Evaluation and curvature are always
    float32."""
    channels_last: bool = False
    """Memory format of images and weights."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted per channel from [0, 1] pixels: a published constant, not a subset's statistic."""
    std: tuple[float, ...] = (0.5,)
    """Divides per channel after `mean`."""

    def __post_init__(self) -> None:
        wrong = [
            message
            for bad, message in (
                (self.epochs < 1, f"epochs must be 1 or more, got {self.epochs}"),
                (self.batch_size < 1, f"batch_size must be 1 or more, got {self.batch_size}"),
                (
                    not self.learning_rate > 0,
                    f"learning_rate must be > 0, got {self.learning_rate}",
                ),
                (
                    self.optimizer not in get_args(OptimizerName),
                    f"no optimizer {self.optimizer!r}",
                ),
                (
                    self.schedule not in ("constant", "linear", "cosine", "steps"),
                    f"no schedule {self.schedule!r}",
                ),
                (
                    self.precision not in ("float32", "tf32", "bfloat16", "float16"),
                    f"no precision {self.precision!r}",
                ),
                (not 0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}"),
                (self.crop_padding < 0, f"crop_padding must be 0 or more, got {self.crop_padding}"),
                (
                    self.crop_scale is not None and not _rises(self.crop_scale, most=1),
                    f"crop_scale must be two rising shares in (0, 1], got {self.crop_scale}",
                ),
                (
                    not _rises(self.crop_ratio),
                    f"crop_ratio must be two rising positive numbers, got {self.crop_ratio}",
                ),
                (
                    self.crop_size is not None and (self.crop_scale is None or self.crop_size < 1),
                    f"crop_size ({self.crop_size}) is 1 or more, and goes with crop_scale",
                ),
                (
                    self.crop_scale is not None and self.crop_padding > 0,
                    "crop_scale and crop_padding are two ways to crop; take one",
                ),
                (
                    not 0 <= self.label_smoothing < 1,
                    f"label_smoothing must be in [0, 1), got {self.label_smoothing}",
                ),
                (self.nesterov and self.momentum == 0, "nesterov needs momentum"),
                (min(self.std, default=0) <= 0, f"std must be positive, got {self.std}"),
            )
            if bad
        ]
        if wrong:
            raise RecipeError("; ".join(wrong))

    def as_dict(self) -> dict[str, object]:
        """The recipe as JSON-ready data, the model by its identity: what a study's hash covers."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
        return {**data, "model": models.identity(self.model)}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps that every trial of a study takes.

    >>> steps = Steps.of(Recipe(model="mlp-8", epochs=3, batch_size=64), subset_size=100)
    >>> steps.batch, steps.total, [steps.end(epoch) for epoch in (1, 2, 3)]
    (64, 5, [1, 3, 5])
    """

    batch: int
    """Examples of each step."""
    total: int
    """Steps of a trial."""
    epochs: int
    """Parts that training is cut into, of equally many steps but for one."""

    @classmethod
    def of(cls, recipe: Recipe, subset_size: int) -> Steps:
        """Of a recipe and a plan's nominal subset size: round(epochs * size / batch) steps."""
        nominal = max(1, subset_size)
        batch = min(recipe.batch_size, nominal)
        total = round(recipe.epochs * nominal / batch)
        return cls(batch=batch, total=total, epochs=recipe.epochs)

    def end(self, epoch: int) -> int:
        """How many steps are taken when `epoch` (from 1) is over."""
        return epoch * self.total // self.epochs


def _rises(pair: tuple[float, float], most: float = math.inf) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= most


def learning_rate_factor(recipe: Recipe, done: float) -> float:
    """The learning rate over its peak, when the fraction `done` in [0, 1) of training is over.

    >>> recipe = Recipe(model="small-resnet", epochs=20, schedule="steps")
    >>> [round(learning_rate_factor(recipe, epoch / 20), 4) for epoch in (0, 12, 16)]
    [1.0, 0.1, 0.01]
    """
    if done < recipe.warmup:
        return done / recipe.warmup
    progress = (done - recipe.warmup) / (1 - recipe.warmup)
    if recipe.schedule == "linear":
        return 1 - progress
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if recipe.schedule == "steps":
        return 0.1 ** sum(done >= milestone - 1e-9 for milestone in recipe.milestones)
    return 1.0
