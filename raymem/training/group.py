"""Several trials at once, trained in one step: for devices that one small model leaves idle.

Each trial keeps its own seeds, subset, order, augmentation, history and result, and is the same
function of its seeds as `run_trial`, but for rounding. What cannot be stacked is trained alone.

Shapes: G trials, N training examples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.curvature import CurvatureRule
from raymem.errors import (
    CurvatureError,
    DivergedError,
    OutOfMemoryError,
    RaymemError,
    first_line,
)
from raymem.plan import Seeds
from raymem.training.checkpoint import Checkpoints, Training
from raymem.training.epoch_curvature import EpochCurvature
from raymem.training.images import Images
from raymem.training.loop import Course, OnEpoch, diverged, longest, restore, start
from raymem.training.precision import products_of
from raymem.training.ranks import ALONE
from raymem.training.recipe import Recipe, Steps
from raymem.training.replay import Replayed, say_once
from raymem.training.stack import Stack, StackedStep
from raymem.training.step import Feed
from raymem.training.trial import (
    TrialResult,
    by_itself,
    fresh_model,
    judge,
    out_of_memory_named,
    run_trial,
)

Outcome = TrialResult | Exception
OnResult = Callable[[int, Outcome], None]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trial of a group: what `run_trial` takes of it."""

    mask: NDArray[np.bool_]
    """bool [N]."""
    seeds: Seeds
    curvature: CurvatureRule | None = None
    keep_weights: bool = False
    checkpoints: Checkpoints | None = None


def run_group(
    images: Images,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    subset_size: int,
    threads: int = 1,
    graph: bool = True,
    on_result: OnResult = lambda number, outcome: None,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[Outcome]:
    """Train G models together, each on its subset, and evaluate each on every example.

    `subset_size` is the plan's: all take the same steps. Of each member there is a result, or the
    exception that `run_trial` would have raised; the others are not touched by it. `on_result`
    hears of each when it is there, `on_epoch` of each member's epochs. On a GPU the step is
    replayed as a CUDA `graph`.

    Where memory is short, the halves are trained one after the other. Models that cannot be stacked
    (see `why_alone`; also those that draw at random while they train, and those that change
    otherwise than by their parameters and in-place buffers) are trained one by one, and the log
    says why. Members whose checkpoints are of different steps form groups of their own.

    Raises StoreError if a checkpoint cannot be saved.

    >>> from raymem.plan import Plan
    >>> x = np.zeros((20, 4, 4, 1), np.uint8)
    >>> y = np.arange(20) % 2
    >>> plan = Plan(n=20, subset_ratio=0.5)
    >>> members = [Member(mask=plan.mask(t), seeds=plan.seeds(t)) for t in range(3)]
    >>> results = run_group(
    ...     Images.from_arrays(x, y, x, y, 2), members, Recipe(model="mlp-8", epochs=2),
    ...     subset_size=plan.subset_size,
    ... )
    >>> [result.how for result in results]
    ['group of 3', 'group of 3', 'group of 3']
    """
    run = _Run(
        images=images, members=members, recipe=recipe, subset_size=subset_size, threads=threads,
        graph=graph, on_result=on_result, on_epoch=on_epoch,
    )  # fmt: skip
    everyone = list(range(len(members)))
    reason = why_alone(recipe, images)
    if reason and len(members) > 1:
        say_once(f"models are trained one by one: {reason}")
    if reason:
        run.one_by_one(everyone)
    else:
        run.together(everyone)
    return [run.outcomes[i] for i in everyone]


def why_alone(recipe: Recipe, images: Images) -> str | None:
    """What of a recipe cannot be done in a group; None if nothing is known."""
    if recipe.precision == "float16":
        return "float16 has a loss scale for each model"
    if recipe.compile:
        return "the model is compiled"
    if images.x_train.device != images.device:
        return "the images are not on the device"
    return None


class Group:
    """G states at the same step, stacked and on their way."""

    def __init__(
        self,
        states: Sequence[Training],
        subsets: Sequence[Tensor],
        images: Images,
        recipe: Recipe,
        steps: Steps,
        *,
        graph: bool = True,
    ) -> None:
        self.stack = Stack(states, recipe)
        feed = Feed(longest(steps), len(states), steps.batch, images.device)
        self.course = Course(
            states=states,
            subsets=subsets,
            history=self.stack.history,
            feed=feed,
            steps=steps,
            recipe=recipe,
            image_shape=images.image_shape,
        )
        step = StackedStep(self.stack, images, recipe, feed)
        captured = graph and images.device.type == "cuda"
        self.step: Callable[[], None] = Replayed(step) if captured else step
        self.how = f"group of {len(states)}" + (", CUDA graph" if captured else "")


@dataclass(kw_only=True)
class _Run:
    images: Images
    members: Sequence[Member]
    recipe: Recipe
    subset_size: int
    threads: int
    graph: bool
    on_result: OnResult
    on_epoch: OnEpoch
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def one_by_one(self, which: Sequence[int]) -> None:
        """Train these by themselves."""
        for i in which:
            member = self.members[i]
            self._done(
                i,
                lambda member=member: run_trial(  # type: ignore[misc]
                    self.images,
                    member.mask,
                    self.recipe,
                    member.seeds,
                    subset_size=self.subset_size,
                    threads=self.threads,
                    curvature=member.curvature,
                    keep_weights=member.keep_weights,
                    checkpoints=member.checkpoints,
                    graph=self.graph,
                    on_epoch=self.on_epoch,
                ),
            )

    def together(self, which: Sequence[int]) -> None:
        """Train these in one step, or in smaller groups where that must be."""
        if len(which) < 2:
            self.one_by_one(which)
            return
        trained = self._try(which)
        if isinstance(trained, _Trained):
            self._judge(which, trained)
            return
        # What was tried is gone with its exception: its memory is free.
        if self.images.device.type == "cuda":
            torch.cuda.empty_cache()
        for part in trained:
            self.together(part)

    def _try(self, which: Sequence[int]) -> list[Sequence[int]] | _Trained:
        """The trained models; or the groups to try instead."""
        try:
            with by_itself(self.members[which[0]].seeds.init, self.threads), out_of_memory_named():
                return self._train(which)
        except OutOfMemoryError:
            half = len(which) // 2
            say_once(
                f"{len(which)} models in one step do not fit the device's memory; {half} at once"
            )
            return [which[:half], which[half:]]
        except RaymemError:
            raise
        except Exception as error:  # whatever vmap or a model in it cannot do
            say_once(f"models are trained one by one: {first_line(error)}")
            return [[i] for i in which]

    def _train(self, which: Sequence[int]) -> list[Sequence[int]] | _Trained:
        """The trained models; or smaller groups, of those that are at the same step."""
        began = time.perf_counter()
        started = [self._start(i) for i in which]
        places: dict[tuple[int, int], list[int]] = {}
        for i, (state, _) in zip(which, started, strict=True):
            places.setdefault((state.step, state.drawn_from), []).append(i)
        if len(places) > 1:
            return list(places.values())
        states, subsets = [state for state, _ in started], [subset for _, subset in started]
        steps = Steps.of(self.recipe, self.subset_size)
        group = Group(states, subsets, self.images, self.recipe, steps, graph=self.graph)
        for state in states:
            if state.how[-1:] != [group.how]:
                state.how.append(group.how)
        failed = self._follow(which, group)
        group.stack.count_batches()
        seconds = time.perf_counter() - began
        seconds -= sum(state.epochs.seconds for state in states if state.epochs is not None)
        return _Trained(states=states, failed=failed, seconds=seconds / len(which))

    def _start(self, i: int) -> tuple[Training, Tensor]:
        member = self.members[i]
        torch.manual_seed(member.seeds.init)
        model = fresh_model(self.images, self.recipe)
        epochs = EpochCurvature.of(
            model, self.images, member.curvature, self.recipe, seed=member.seeds.init
        )
        state, subset = start(model, self.images, member.mask, self.recipe, member.seeds, epochs)
        restore(state, member.checkpoints, ALONE)
        return state, subset

    def _follow(self, which: Sequence[int], group: Group) -> dict[int, Exception]:
        """Train; returns who failed, by its place in the group, and of what."""
        course, states = group.course, group.course.states
        failed: dict[int, Exception] = {}
        kept = [checkpoints for i in which if (checkpoints := self.members[i].checkpoints)]
        with products_of(self.recipe, self.images.device):
            while course.left and len(failed) < len(states):
                for _ in course.begin():
                    group.step()
                    course.took_one()
                    if kept and kept[0].due():
                        self._save(which, group, failed)
                if course.end():
                    finite = course.history.finite().tolist()
                    for g, state in enumerate(states):
                        state.end_epoch()
                        if not finite[g]:
                            failed.setdefault(g, diverged(state.epoch, self.recipe))
                        if g not in failed:
                            self._measure(g, state, failed)
                        self.on_epoch(state.epoch)
        return failed

    def _measure(self, g: int, state: Training, failed: dict[int, Exception]) -> None:
        """Curvature at the end of an epoch; what is wrong with it fails its member only."""
        try:
            state.measure()
        except (CurvatureError, DivergedError) as error:
            failed[g] = error

    def _save(self, which: Sequence[int], group: Group, failed: dict[int, Exception]) -> None:
        group.course.count()
        group.stack.count_batches()
        for g, (i, state) in enumerate(zip(which, group.course.states, strict=True)):
            checkpoints = self.members[i].checkpoints
            if checkpoints is not None and g not in failed:
                checkpoints.save(state.as_bytes())

    def _judge(self, which: Sequence[int], trained: _Trained) -> None:
        for g, i in enumerate(which):
            if g in trained.failed:
                self._report(i, trained.failed[g])
            else:
                self._done(i, lambda i=i, g=g: self._result(i, trained.states[g], trained.seconds))  # type: ignore[misc]

    def _result(self, i: int, state: Training, seconds: float) -> TrialResult:
        member = self.members[i]
        with by_itself(member.seeds.init, self.threads), out_of_memory_named():
            return judge(
                state.model,
                self.images,
                self.recipe,
                member.seeds,
                state.shown(),
                ", then ".join(state.how),
                curvature=member.curvature,
                epochs=state.epochs,
                keep_weights=member.keep_weights,
                ranks=ALONE,
                start=time.perf_counter() - seconds,
            )

    def _done(self, i: int, work: Callable[[], TrialResult]) -> None:
        try:
            outcome: Outcome = work()
        except Exception as error:  # this member's; the others go on
            outcome = error
        self._report(i, outcome)

    def _report(self, i: int, outcome: Outcome) -> None:
        self.outcomes[i] = outcome
        self.on_result(i, outcome)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    states: Sequence[Training]
    failed: dict[int, Exception]
    """Who failed, and of what."""
    seconds: float
    """Each model's share, without curvature."""
