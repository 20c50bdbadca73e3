"""Options of job files: what the study is, and how this machine or cluster runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import click

from raymem.curvature import PRECISIONS, CurvatureRule, PaperRule
from raymem.data import NAMED, Examples, draw_training, flip_labels, load_examples
from raymem.errors import RecipeError
from raymem.fleet import Engine, TrialOptions
from raymem.plan import Kind
from raymem.privacy import EPSILON_GRIDS, Privacy
from raymem.scores import Until
from raymem.study import Study
from raymem.training import Recipe

Decorator = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What the user asked for on the command line, defaults from the job file."""

    data: str
    data_root: str
    download: bool
    image_size: int | None
    store: str
    trials: int
    subset_ratio: float
    kind: Kind
    seed: int
    part: tuple[int, int] | None = None
    recipe: Recipe | None = None
    """The one of --recipe, for jobs that have several."""
    curvature: CurvatureRule | None = None
    """How curvature is measured, with --curvature."""
    curvature_trials: int | None = None
    keep_models: int = 0
    curvature_at: Literal["trial", "stage"] = "trial"
    curvature_data: str | None = None
    checkpoint_seconds: float = TrialOptions.checkpoint_seconds
    epsilons: tuple[float, ...] = (math.inf,)
    privacy: Privacy | None = None
    """How trials are made private, with --epsilons."""
    flip_labels: float = 0.0
    """Share of training labels that are made wrong on purpose."""
    pool: tuple[str, int] | None = None
    """--pool-from: the store whose most memorized examples are the candidates, and how many."""

    rest_ratio: float = 1.0
    """Share of the other examples that each model trains on, with --pool-from."""
    train_examples: int | None = None
    """How many of the training examples are taken; None: all."""

    def load_examples(self) -> Examples:
        """The data set of --data, or --train-examples of it, with the labels that --flip-labels
        makes wrong."""
        examples = load_examples(
            self.data,
            data_root=self.data_root,
            download=self.download,
            image_size=self.image_size,
        )
        if self.train_examples is not None:
            examples = draw_training(examples, self.train_examples)
        return flip_labels(examples, self.flip_labels) if self.flip_labels else examples

    def study(self, recipe: Recipe | None = None) -> Study:
        """The study of these options, with `recipe` or the one of --recipe."""
        chosen = recipe or self.recipe
        if chosen is None:
            raise RecipeError("give study() a recipe, or run_job() recipes to choose from")
        examples = self.load_examples()
        drawn: dict[str, Any] = {"kind": self.kind}
        if self.pool is not None:
            from raymem.links import most_memorized

            drawn = {"kind": "candidate-pool", "pool": most_memorized(examples, *self.pool)}
        return Study(
            examples=examples,
            recipe=chosen,
            store=self.store,
            trials=self.trials,
            subset_ratio=self.subset_ratio,
            **drawn,
            rest_ratio=self.rest_ratio,
            seed=self.seed,
            curvature=self.curvature,
            curvature_trials=self.curvature_trials,
            keep_models=self.keep_models,
            curvature_at=self.curvature_at,
            curvature_data=self.curvature_data,
            checkpoint_seconds=self.checkpoint_seconds,
            epsilons=self.epsilons,
            privacy=self.privacy,
            part=self.part,
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the machine or cluster runs a study: no part of what the study is."""

    engine: Engine
    cpus_per_trial: int
    gpus_per_trial: float | None
    workers_per_trial: int
    models_per_step: int | None
    max_workers: int | None
    verbose: bool


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which help shows them."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


class PartOf(click.ParamType[tuple[int, int]]):
    """K/N."""

    name = "K/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Raises click.BadParameter for what is none."""
        if isinstance(value, tuple):
            return value
        number, slash, of = str(value).partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            self.fail(f"{value!r} is no part; give K/N with K from 1 to N, such as 1/2", param, ctx)
        return int(number), int(of)


def data_options(data: str) -> Decorator:
    """Which examples."""
    return together(
        click.option(
            "--data",
            default=data,
            help=f"{', '.join(NAMED)}, an .npz file, a folder, or a cache that raymem ingest made.",
        ),
        click.option("--data-root", default="data", help="Where torchvision's files are."),
        click.option("--download", is_flag=True, help="Let torchvision fetch the named set."),
        click.option(
            "--image-size", type=click.IntRange(1), help="Resize folder images to this square."
        ),
        click.option(
            "--train-examples",
            type=click.IntRange(1),
            help="Take this many of the training examples, drawn by their ids.  [default: all]",
        ),
    )


def study_options(
    *, data: str, store: str, trials: int, subset_ratio: float, seed: int, flipped: float
) -> Decorator:
    """What the study is of, and how large."""
    return together(
        data_options(data),
        click.option("--store", default=store, help="Folder or URL of the study."),
        click.option("--trials", type=click.IntRange(1), default=trials, help="How many models."),
        click.option(
            "--subset-ratio", type=float, default=subset_ratio, help="Share each model sees."
        ),
        click.option(
            "--kind",
            type=click.Choice(["balanced", "fixed-size"]),
            default="balanced",
            help="How subsets are drawn.",
        ),
        click.option(
            "--part",
            type=PartOf(),
            help="Train only part K/N of the trials, such as 1/2; see `raymem merge`.",
        ),
        click.option("--seed", type=click.IntRange(0), default=seed, help="Start of all chance."),
        click.option(
            "--max-pairs", type=click.IntRange(1), default=1_000_000, help="Influence pairs kept."
        ),
        click.option(
            "--flip-labels",
            type=click.FloatRange(0, 0.5),
            default=flipped,
            help="Make this share of the training labels wrong on purpose.",
        ),
    )


class ModelsPerStep(click.ParamType[int | None]):
    """A number, or auto: None."""

    name = "auto|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Raises click.BadParameter for what is neither."""
        if value == "auto" or isinstance(value, int):
            return None if value == "auto" else value
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"{value!r} is neither auto nor a number from 1 on", param, ctx)
        return int(value)


machine_options = together(
    click.option(
        "--engine",
        type=click.Choice(["ray", "serial"]),
        default="ray",
        help="serial: in this process, without Ray.",
    ),
    click.option(
        "--cpus-per-trial", type=click.IntRange(1), default=1, help="Threads of one worker."
    ),
    click.option(
        "--gpus-per-trial",
        type=float,
        help="GPUs of one worker; fractions pack models.  [default: 1 if any]",
    ),
    click.option(
        "--workers-per-trial",
        type=click.IntRange(1),
        default=1,
        help="Train each model on so many GPUs (or cores) together.",
    ),
    click.option(
        "--models-per-step",
        type=ModelsPerStep(),
        default="auto",
        show_default=True,
        help="Train this many models at once in each worker, in the same steps; auto: on a GPU as "
        "many as it is faster with, on a CPU one.",
    ),
    click.option("--max-workers", type=click.IntRange(1), help="Most workers at once."),
    click.option(
        "--checkpoint-minutes",
        type=click.FloatRange(0),
        default=TrialOptions.checkpoint_seconds / 60,
        help="Save trials this often while they train.",
    ),
    click.option("--verbose", is_flag=True, help="Show what Ray says."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


class UntilTarget(click.ParamType[Until]):
    """A target of the stopping rule."""

    name = "target"

    def convert(self, value: Any, param: Any, ctx: Any) -> Until:
        """Raises click.BadParameter for what is none."""
        try:
            return value if isinstance(value, Until) else Until.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


plan_options = together(
    click.option(
        "--until",
        type=UntilTarget(),
        help="Train whole blocks until reliability=0.98, or ci-width=0.1 (of nine intervals in "
        "ten), --trials at most; at the largest epsilon.",
    ),
    click.option(
        "--machines", type=click.IntRange(1), default=1, help="`plan` counts for so many."
    ),
    click.option(
        "--trials-at-once", type=click.IntRange(1), help="On each.  [default: one a core, here]"
    ),
    click.option(
        "--times-faster",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        help="A trial there than here.",
    ),
    click.option("--price", type=click.FloatRange(min=0), help="Of a machine for an hour."),
)


def recipe_option(recipes: Mapping[str, Recipe]) -> Decorator:
    """--recipe, for jobs that have several; the first is the default."""
    if not recipes:
        return lambda function: function
    names = list(recipes)
    return click.option(
        "--recipe", type=click.Choice(names), default=names[0], help="How each model is trained."
    )


class EveryEpochs(click.ParamType[int]):
    """A number, or every: 1."""

    name = "every|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Raises click.BadParameter for what is neither."""
        if value == "every":
            return 1
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"{value!r} is neither every nor a number from 1 on", param, ctx)
        return int(value)


def curvature_options(*, on: bool, at: Literal["trial", "stage"], trials: int | None) -> Decorator:
    """If, when, and in how many trials curvature is measured."""
    return together(
        click.option(
            "--curvature/--no-curvature",
            default=on,
            help="Measure every training example's curvature.",
        ),
        click.option(
            "--curvature-trials",
            type=click.IntRange(1),
            default=trials,
            help="In the first so many trials only, whole blocks."
            + ("" if trials else "  [default: all]"),
        ),
        click.option(
            "--curvature-at",
            type=click.Choice(["trial", "stage"]),
            default=at,
            help="At the end of each trial, or after training with the weights kept.",
        ),
        click.option(
            "--curvature-data",
            help="For the stage: shards to read images from.  [default: the cache]",
        ),
        click.option(
            "--curvature-mode",
            type=click.Choice(["auto", "gauss-newton", "hessian"]),
            default="auto",
            help="How the trace is computed.",
        ),
        click.option(
            "--curvature-precision",
            type=click.Choice(["auto", *PRECISIONS]),
            default="auto",
            help="Of its backward passes, where the trace keeps to 0.001 of float32's on examples "
            "of the set, else float32. auto: on NVIDIA GPUs the fastest, elsewhere float32.",
        ),
        click.option(
            "--curvature-epochs",
            type=EveryEpochs(),
            help="Also average curvature over training: every epoch, or every Nth, the last among "
            "them.  [default: the trained model's only]",
        ),
        click.option(
            "--paper-step",
            type=float,
            default=PaperRule.step,
            help="Step h of the paper's score, in [0, 1] pixels.",
        ),
        click.option(
            "--keep-models",
            type=click.IntRange(0),
            default=0,
            help="Keep the weights of the first so many trials.",
        ),
    )


class Epsilons(click.ParamType[tuple[float, ...]]):
    """Privacy budgets: the name of a grid, or numbers between commas."""

    name = "epsilons"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Raises click.BadParameter for what is neither."""
        if isinstance(value, tuple):
            return value
        if value in EPSILON_GRIDS:
            return EPSILON_GRIDS[value]
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is neither a grid ({', '.join(EPSILON_GRIDS)}) nor numbers such as "
                "0.5,2,8,inf",
                param,
                ctx,
            )


def privacy_options(*, epsilons: str | None) -> Decorator:
    """At which epsilons trials are private, and how."""
    return together(
        click.option(
            "--epsilons",
            type=Epsilons(),
            default=epsilons,
            help="Train every subset at each of these privacy budgets, such as 0.5,2,8,inf, or "
            f"{', '.join(EPSILON_GRIDS)}." + ("" if epsilons else "  [default: not private]"),
        ),
        click.option("--delta", type=float, default=Privacy.delta, help="Of (epsilon, delta)-DP."),
        click.option(
            "--max-grad-norm",
            type=float,
            default=Privacy.max_grad_norm,
            help="Norm each example's gradient is clipped to.",
        ),
        click.option(
            "--accountant",
            type=click.Choice(["prv", "rdp"]),
            default=Privacy.accountant,
            help="What counts the epsilon spent.",
        ),
        click.option(
            "--clip-control", is_flag=True, help="At epsilon inf, clip all the same, without noise."
        ),
        click.option(
            "--secure-mode",
            is_flag=True,
            help="Noise that nobody can repeat, hardened against floating-point attacks.",
        ),
    )


def pool_options(size: int | None) -> Decorator:
    """--pool-from, for jobs whose candidates are an earlier study's most memorized examples."""
    if size is None:
        return lambda function: function
    return together(
        click.option(
            "--pool-from",
            help="Store of an earlier study of the same set: only its most memorized examples are "
            "drawn, all others are always in.",
        ),
        click.option("--pool-size", type=click.IntRange(1), default=size, help="How many of them."),
        click.option(
            "--rest-ratio",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            help="Share of the other examples that each model trains on.",
        ),
    )
