"""The training loop: models, their subsets, step after step, on one worker or several.

Shapes: N training examples, n in the subset, G models, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymem.errors import DivergedError, TrialError
from raymem.plan import Seeds
from raymem.training.batches import Batches, Piece, pieces
from raymem.training.checkpoint import Checkpoints, Moves, Training
from raymem.training.epoch_curvature import EpochCurvature
from raymem.training.history import History, SubsetHistory
from raymem.training.images import Images
from raymem.training.optimizer import Optimizer, rates
from raymem.training.precision import products_of
from raymem.training.ranks import ALONE, Ranks
from raymem.training.recipe import Recipe, Steps
from raymem.training.replay import Replayed
from raymem.training.step import Feed, SingleStep, memory_format_of

OnEpoch = Callable[[int], None]


def train(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    *,
    subset_size: int | None = None,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
    graph: bool = True,
    on_epoch: OnEpoch = lambda epoch: None,
) -> SubsetHistory:
    """Train `model` in place on the examples of `mask` (bool [N]), by the steps of `recipe`.

    `subset_size` is the plan's, by which steps are counted; None: that of the mask. Goes on from
    the last of `checkpoints`, if there is one, and saves others when they are due. Several `ranks`
    each take their share of every batch: order and augmentation do not depend on how many they are,
    nor do gradients but for rounding, unless layers look at a whole batch: BatchNorm takes the
    statistics of each worker's share. On a GPU the steps are replayed as a CUDA `graph`.

    Raises DivergedError after the first epoch with a loss that is not finite.
    """
    state = train_alone(
        model, images, mask, recipe, seeds, subset_size=subset_size, checkpoints=checkpoints,
        ranks=ranks, graph=graph, on_epoch=on_epoch,
    )  # fmt: skip
    return state.shown()


def train_alone(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    *,
    subset_size: int | None = None,
    checkpoints: Checkpoints | None = None,
    ranks: Ranks = ALONE,
    graph: bool = True,
    epochs: EpochCurvature | None = None,
    on_epoch: OnEpoch = lambda epoch: None,
) -> Training:
    """`train`, with all that it leaves; curvature is measured where `epochs` are due."""
    state, subset = start(model, images, mask, recipe, seeds, epochs)
    steps = Steps.of(recipe, subset_size or state.n)
    if not ranks.alone:
        # Dropout must not draw the same on all workers.
        torch.manual_seed(seeds.init + ranks.rank)
    restore(state, checkpoints, ranks)
    feed = Feed(longest(steps), 1, steps.batch, images.device)
    step = SingleStep(state, images, recipe, ranks, feed)
    course = Course(
        states=[state],
        subsets=[subset],
        history=state.history,
        feed=feed,
        steps=steps,
        recipe=recipe,
        image_shape=images.image_shape,
    )
    resident = images.x_train.device == images.device
    captured = graph and resident and _can_be_captured(images.device, recipe, ranks)
    take: Callable[[Tensor | None], None] = Replayed(step) if captured else step
    name = "alone, CUDA graph" if captured else "alone"
    if state.how[-1:] != [name]:
        state.how.append(name)

    def save() -> None:
        if checkpoints is not None and ranks.rank == 0 and checkpoints.due():
            course.count()
            checkpoints.save(state.as_bytes())

    with products_of(recipe, images.device):
        while course.left:
            for pixels in course.begin(None if resident else images, ranks):
                take(pixels)
                course.took_one()
                save()
            if course.end():
                check_finite(state.history, state.epoch + 1, recipe)
                state.end_epoch()
                state.measure()
                on_epoch(state.epoch)
    state.optimizer.forget_gradients()  # type: ignore[attr-defined]
    return state


def longest(steps: Steps) -> int:
    """Steps of the largest piece."""
    return max(piece.stop - piece.start for piece in pieces(steps))


def _can_be_captured(device: torch.device, recipe: Recipe, ranks: Ranks) -> bool:
    # float16's loss scale is decided on the host, and workers wait for each other there.
    decided_on_host = recipe.precision == "float16" or recipe.compile or not ranks.alone
    return device.type == "cuda" and not decided_on_host


@dataclass(kw_only=True)
class Course:
    """The way of one model, or of several side by side, through the pieces of their training.

    For each piece: `begin`, then for each of its steps the step itself and `took_one`, then `end`.
    """

    states: Sequence[Training]
    """G models, all at the same step."""
    subsets: Sequence[Tensor]
    """int64 [n] each: rows of the set."""
    history: History
    """Of all of them."""
    feed: Feed
    steps: Steps
    recipe: Recipe
    image_shape: tuple[int, int, int]
    _pieces: Iterator[Piece] = field(init=False)
    _piece: Piece | None = field(init=False)
    _batches: list[Batches] = field(init=False)
    _counted: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # A checkpoint written in the middle of a piece goes on there, also after its last step:
        # the piece is drawn again from where it began.
        drawn_from = self.states[0].drawn_from
        self._pieces = (piece for piece in pieces(self.steps) if piece.start >= drawn_from)
        self._draw_next()

    @property
    def left(self) -> bool:
        """Is there a piece left?"""
        return self._piece is not None

    def begin(
        self, pixels_from: Images | None = None, ranks: Ranks = ALONE
    ) -> Iterable[Tensor | None]:
        """Send the batches of the next piece to the device; returns one item per step.

        An item is None if the images are on the device already, else the pixels of this worker's
        share of the batch.
        """
        piece = self._piece
        assert piece is not None
        at = self.states[0].step - piece.start
        for state in self.states:
            state.drawn_from = piece.start
        rows = rates(self.recipe, self.steps, piece.start, piece.stop)
        self.feed.load(self._batches, self.subsets, rows, at)
        self._start, self._counted = piece.start, at
        if pixels_from is None:
            return [None] * (piece.stop - self.states[0].step)
        places = self._batches[0].places[at:, ranks.part(self.steps.batch)]
        return pixels_from.training_batches(self.subsets[0][places])

    def took_one(self) -> None:
        """A step was taken."""
        for state in self.states:
            state.step += 1

    def count(self) -> None:
        """Bring the history to where training is."""
        at = self.states[0].step - self._start
        self.feed.count(self.history, self._counted, at)
        self._counted = at

    def end(self) -> bool:
        """Draw the next piece while the device is busy, then wait for it. Is an epoch over?"""
        piece = self._piece
        assert piece is not None
        self._draw_next()
        self.count()
        return piece.last

    def _draw_next(self) -> None:
        self._piece = next(self._pieces, None)
        if self._piece is not None:
            self._batches = [
                state.stream.batches(self._piece, self.steps.batch, self.recipe, self.image_shape)
                for state in self.states
            ]


def start(
    model: nn.Module,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    epochs: EpochCurvature | None = None,
) -> tuple[Training, Tensor]:
    """The state before the first batch, and the rows of the subset, int64 [n]."""
    model.to(memory_format=memory_format_of(recipe)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return start_with(model, Optimizer(parameters, recipe), images, mask, recipe, seeds, epochs)


def start_with(
    model: nn.Module,
    optimizer: Moves,
    images: Images,
    mask: NDArray[np.bool_],
    recipe: Recipe,
    seeds: Seeds,
    epochs: EpochCurvature | None = None,
) -> tuple[Training, Tensor]:
    """`start`, with this optimizer."""
    subset = torch.from_numpy(np.flatnonzero(mask))
    if len(subset) == 0:
        raise TrialError("the subset is empty; take a larger subset_ratio or more examples")
    scaler = torch.amp.GradScaler(images.device.type, enabled=recipe.precision == "float16")
    n = len(subset)
    return Training(model, optimizer, scaler, n, seeds.order, seeds.augment, epochs), subset


def check_finite(history: History, epoch: int, recipe: Recipe) -> None:
    """Raises DivergedError if a loss was not finite."""
    if not bool(history.finite().all()):
        raise diverged(epoch, recipe)


def diverged(epoch: int, recipe: Recipe) -> DivergedError:
    """What is said of a training whose loss was not finite in `epoch`, from 1."""
    return DivergedError(
        f"the training loss was not finite in epoch {epoch} of {recipe.epochs}; "
        "a smaller learning_rate or a warmup may help"
    )


def restore(state: Training, checkpoints: Checkpoints | None, ranks: Ranks) -> Any:
    """From rank 0's checkpoint on all ranks: another could have read a later one."""
    if checkpoints is None:
        return None
    data = ranks.broadcast(checkpoints.load() if ranks.rank == 0 else None)
    return None if data is None else state.restore(data, ranks.rank)
