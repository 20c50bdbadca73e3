"""The command line of a job file: its study's settings as options, its stages as an argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click

from raymem.cli import command_errors
from raymem.curvature import CurvatureRule, PaperRule
from raymem.errors import RecipeError, StoreError
from raymem.examples import NAMED, Examples, load_examples
from raymem.fleet import Engine, duration
from raymem.links import by_memorization, correlations
from raymem.memorization import PairRule
from raymem.plan import Kind
from raymem.store import Store
from raymem.study import Study
from raymem.tables import top, where
from raymem.text import (
    as_text,
    bins_text,
    correlations_text,
    for_people,
    pairs_for_people,
    summary_text,
)
from raymem.training import Recipe

STAGES = ("all", "plan", "train", "score")


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
        )


def run_job(
    build: Callable[[JobOptions], Study],
    *,
    data: str,
    store: str,
    trials: int,
    subset_ratio: float = 0.7,
    seed: int = 0,
    recipes: Mapping[str, Recipe] | None = None,
    curvature: bool = False,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a job file: `build` makes the study from the options, whose defaults are given here.

    `recipes` adds an option --recipe to choose one by name, the first by default. `curvature` says
    if trials measure it unless --no-curvature (or --curvature) is given.

    Exits with 0 when done, 1 on failure, 2 on wrong usage, 3 if another driver holds the store, 4
    without space.
    """

    @click.command(
        help=(sys.modules[build.__module__].__doc__ or "").replace("\n\n", "\n\n\b\n"),
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    @click.argument("stage", type=click.Choice(STAGES), default="all")
    @click.option(
        "--data", default=data, help=f"{', '.join(NAMED)}, an .npz file, a folder, or a cache."
    )
    @click.option("--data-root", default="data", help="Where torchvision's files are.")
    @click.option("--download", is_flag=True, help="Let torchvision fetch the named set.")
    @click.option(
        "--image-size", type=click.IntRange(1), help="Resize folder images to this square."
    )
    @click.option("--store", default=store, help="Folder or URL of the study.")
    @click.option("--trials", type=click.IntRange(1), default=trials, help="How many models.")
    @click.option("--subset-ratio", type=float, default=subset_ratio, help="Share each model sees.")
    @click.option(
        "--kind",
        type=click.Choice(["balanced", "fixed-size"]),
        default="balanced",
        help="How subsets are drawn.",
    )
    @click.option("--seed", type=click.IntRange(0), default=seed, help="Start of all randomness.")
    @click.option(
        "--engine",
        type=click.Choice(["ray", "serial"]),
        default="ray",
        help="serial: in this process, without Ray.",
    )
    @click.option(
        "--cpus-per-trial", type=click.IntRange(1), default=1, help="Threads of one trial."
    )
    @click.option(
        "--gpus-per-trial", type=float, help="Fractions pack models.  [default: 1 if any]"
    )
    @click.option("--max-workers", type=click.IntRange(1), help="Most trials at once.")
    @click.option(
        "--max-pairs", type=click.IntRange(1), default=1_000_000, help="Influence pairs kept."
    )
    @_recipe_option(recipes or {})
    @_curvature_options(curvature)
    @click.option("--verbose", is_flag=True, help="Show what Ray says.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    def command(
        stage: str,
        engine: str,
        cpus_per_trial: int,
        gpus_per_trial: float | None,
        max_workers: int | None,
        verbose: bool,
        debug: bool,
        max_pairs: int,
        curvature: bool,
        curvature_mode: str,
        paper_step: float,
        recipe: str | None = None,
        **settings: Any,
    ) -> None:
        with command_errors(debug):
            if curvature:
                settings["curvature"] = CurvatureRule(
                    mode=cast(Any, curvature_mode), paper=PaperRule(step=paper_step)
                )
            settings["recipe"] = recipes[recipe] if recipes and recipe else None
            settings["store"] = absolute_store(settings["store"])
            study = build(JobOptions(**settings))
            if stage == "plan":
                click.echo(study.dry_run(cpus_per_trial=cpus_per_trial, workers=max_workers))
                return
            click.echo(study.examples.describe())
            if stage in ("all", "train"):
                progress = study.train(
                    engine=cast(Engine, engine),
                    cpus_per_trial=cpus_per_trial,
                    gpus_per_trial=gpus_per_trial,
                    max_workers=max_workers,
                    verbose=verbose,
                )
                if progress.rate:
                    click.echo(
                        f"{progress.committed:,} trials trained, one every "
                        f"{duration(1 / progress.rate)}"
                    )
            if stage in ("all", "score"):
                score_and_print(study, PairRule(max_pairs=max_pairs))

    command.main(args=None if arguments is None else list(arguments), standalone_mode=True)


def _recipe_option(recipes: Mapping[str, Recipe]) -> Callable[[Any], Any]:
    if not recipes:
        return lambda function: function
    names = list(recipes)
    return click.option(
        "--recipe", type=click.Choice(names), default=names[0], help="How each model is trained."
    )


def _curvature_options(on: bool) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for option in (
            click.option(
                "--keep-models",
                type=click.IntRange(0),
                default=0,
                help="Keep the weights of the first so many trials.",
            ),
            click.option(
                "--paper-step",
                type=float,
                default=PaperRule.step,
                help="Step h of the paper's score, in [0, 1] pixels.",
            ),
            click.option(
                "--curvature-mode",
                type=click.Choice(["auto", "gauss-newton", "hessian"]),
                default="auto",
                help="How the trace is computed.",
            ),
            click.option(
                "--curvature-trials",
                type=click.IntRange(1),
                help="Measure it in the first so many trials only, whole blocks.  [default: all]",
            ),
            click.option(
                "--curvature/--no-curvature",
                default=on,
                help="Measure every training example's curvature in each trial.",
            ),
        ):
            function = option(function)
        return function

    return add


def score_and_print(study: Study, rule: PairRule) -> None:
    """The score stage: the most memorized examples, the strongest pairs, where the files are."""
    summaries = study.score(rule)
    trained = where(study.scores(), "split == train")
    click.echo("\nThe ten most memorized training examples (95% intervals):")
    click.echo(as_text(for_people(top(trained, "memorization", 10))))
    pairs = study.scores("influence")
    click.echo("\nThe five most influential pairs of a training and a test example:")
    click.echo(as_text(pairs_for_people(top(pairs, "influence", 5))))
    click.echo("\n" + summary_text(summaries))
    store = Store(study.store)
    compared = correlations(store)
    if compared:
        click.echo("\n" + correlations_text(compared))
        click.echo("\n" + bins_text(by_memorization(store)))
    click.echo(f"\nscores:  {store.files.path('scores/examples.parquet')}")
    click.echo(f"pairs:   {store.files.path('scores/influence.parquet')}")
    click.echo(f"trials:  {store.files.path('scores/trials.parquet')}")
    click.echo(f"look at: raymem scores {store.url} --top 20")


def absolute_store(store: str, option: str = "--store") -> str:
    """The path of an option made absolute, or its URL; relative ones are refused in submitted jobs.

    A submitted job runs in a temporary copy of the working folder, where results would vanish.
    """
    if "://" in store or Path(store).is_absolute():
        return store
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise StoreError(
            f"{option} {store} is relative, and a submitted job runs in a temporary folder; give "
            "an absolute path that all nodes see, or a URL"
        )
    return str(Path(store).expanduser().absolute())
