"""Options of job files: what the study is, and how this machine or cluster runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import click

from raymem.curvature import CurvatureRule, PaperRule
from raymem.errors import RecipeError
from raymem.examples import NAMED, Examples, load_examples
from raymem.fleet import Engine, Extras
from raymem.plan import Kind
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
    recipe: Recipe | None = None
    """The one of --recipe, for jobs that have several."""
    curvature: CurvatureRule | None = None
    """How curvature is measured, with --curvature."""
    curvature_trials: int | None = None
    keep_models: int = 0
    curvature_at: Literal["trial", "stage"] = "trial"
    curvature_data: str | None = None
    checkpoint_seconds: float = Extras.checkpoint_seconds

    def load_examples(self) -> Examples:
        """The data set of --data."""
        return load_examples(
            self.data,
            data_root=self.data_root,
            download=self.download,
            image_size=self.image_size,
        )

    def study(self, recipe: Recipe | None = None) -> Study:
        """The study of these options, with `recipe` or the one of --recipe."""
        chosen = recipe or self.recipe
        if chosen is None:
            raise RecipeError("give study() a recipe, or run_job() recipes to choose from")
        return Study(
            examples=self.load_examples(),
            recipe=chosen,
            store=self.store,
            trials=self.trials,
            subset_ratio=self.subset_ratio,
            kind=self.kind,
            seed=self.seed,
            curvature=self.curvature,
            curvature_trials=self.curvature_trials,
            keep_models=self.keep_models,
            curvature_at=self.curvature_at,
            curvature_data=self.curvature_data,
            checkpoint_seconds=self.checkpoint_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the machine or cluster runs a study: no part of what the study is."""

    engine: Engine
    cpus_per_trial: int
    gpus_per_trial: float | None
    workers_per_trial: int
    max_workers: int | None
    verbose: bool


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which help shows them."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def study_options(
    *, data: str, store: str, trials: int, subset_ratio: float, seed: int
) -> Decorator:
    """What the study is of, and how large."""
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
        click.option("--seed", type=click.IntRange(0), default=seed, help="Start of all chance."),
        click.option(
            "--max-pairs", type=click.IntRange(1), default=1_000_000, help="Influence pairs kept."
        ),
    )


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
    click.option("--max-workers", type=click.IntRange(1), help="Most workers at once."),
    click.option(
        "--checkpoint-minutes",
        type=click.FloatRange(0),
        default=Extras.checkpoint_seconds / 60,
        help="Save trials this often while they train.",
    ),
    click.option("--verbose", is_flag=True, help="Show what Ray says."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


def recipe_option(recipes: Mapping[str, Recipe]) -> Decorator:
    """--recipe, for jobs that have several; the first is the default."""
    if not recipes:
        return lambda function: function
    names = list(recipes)
    return click.option(
        "--recipe", type=click.Choice(names), default=names[0], help="How each model is trained."
    )


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
