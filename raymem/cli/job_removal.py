"""The command line of a removal experiment: scores first, then trials without the memorized."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import click

from raymem.cli.job_settings import DataSettings, JobSettings, recipe_option
from raymem.cli.options import run_command, stage_argument
from raymem.data import Examples
from raymem.errors import StoreError
from raymem.fleet import Resources
from raymem.links import Removed, find_removal, removal_by_scores
from raymem.settings import Setting
from raymem.show import removal_text, write_removal
from raymem.show.dry_run import planned
from raymem.store import Store, parse_part
from raymem.study import Study
from raymem.training import Recipe

STAGES = ("all", "plan", "scores", "train", "removal")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings(DataSettings):
    """The experiment."""

    store: Annotated[str, Setting(path=True)]
    """Folder or URL of the experiment."""
    scores_from: Annotated[str | None, Setting(path=True)] = None
    """A scored store of the same examples, by which they are chosen; None: STORE_scores, trained
    first."""
    trials: Annotated[int, Setting(least=20)] = 100
    """Models that memorization is measured with, in STORE_scores."""
    part: Annotated[tuple[int, int] | None, Setting(parse=parse_part, form="K/N")] = None
    """Train only part K/N of the repeats, such as 1/2; None: all."""
    seed: Annotated[int, Setting(least=0)] = 0
    """Random seed."""

    def scoring(self, recipe: Recipe) -> Study:
        """The study that measures memorization."""
        shared = [f.name for f in dataclasses.fields(DataSettings)]
        settings = JobSettings(
            **{name: getattr(self, name) for name in shared},
            store=f"{self.store.rstrip('/')}_scores",
            trials=self.trials,
            seed=self.seed,
        )
        return settings.study(recipe)

    @property
    def fixed(self) -> set[str]:
        """Fields that are no options: where images come from, if the job made them itself."""
        own = {"data", "data_root", "download", "image_size"}
        return own if isinstance(self.data, Examples) else set()


@dataclass(frozen=True, kw_only=True)
class RemovalSettings(ExperimentSettings):
    """The removal experiment."""

    sizes: Annotated[tuple[int, ...], Setting(form="NUMBERS")] = (10, 20, 40, 80)
    """Numbers of training examples that are removed."""
    repeats: Annotated[int, Setting(least=1)] = 10
    """Models for each size and each way to choose what is removed; can be raised later."""

    def study(self, scoring: Study, source: str) -> Study:
        """The experiment, of the examples that the store `source` finds most memorized."""
        removal = removal_by_scores(scoring.examples, source, self.sizes)
        return dataclasses.replace(
            scoring,
            store=self.store,
            kind="removal",
            removal=removal,
            subset_ratio=1,
            trials=self.repeats * removal.block,
            part=self.part,
        )


def run_removal_job(
    settings: RemovalSettings,
    recipes: Recipe | Mapping[str, Recipe],
    *,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a removal experiment (Feldman & Zhang 2020, section 4), each of whose `settings` an
    option can change; of several `recipes`, --recipe chooses one.

    `settings.trials` models go to STORE_scores, unless --scores-from names a scored store; then, in
    each repeat, one model on all examples and one of each arm and size go to STORE. Exits as
    `run_command` does.
    """

    def work(
        given: RemovalSettings, resources: Resources, stage: str, recipe: str | None = None
    ) -> None:
        chosen = recipes if isinstance(recipes, Recipe) else recipes[str(recipe)]
        run_removal(given, given.scoring(chosen), resources, stage)

    params = [stage_argument(STAGES), *recipe_option(recipes)]
    run_command(
        work, settings, Resources(), skip=settings.fixed, params=params, arguments=arguments
    )


def run_removal(
    settings: RemovalSettings, scoring: Study, resources: Resources, stage: str
) -> None:
    """One stage, or all of them in turn."""
    threads = resources.cpus_per_trial
    if settings.scores_from is None and stage in ("all", "scores"):
        score_first(scoring, resources)
    if stage == "scores":
        return
    if stage == "removal":
        _show(find_removal(Store(settings.store)))
        return
    if stage == "plan" and settings.scores_from is None and not has_scores(scoring):
        click.echo("First, the trials that memorization is measured with:")
        click.echo(planned(scoring, threads=threads))
        return
    study = settings.study(scoring, settings.scores_from or str(scoring.store))
    if stage == "plan":
        click.echo(planned(study, threads=threads))
        return
    study.train(resources)
    command = shlex.join(["python", *sys.argv])
    study.open_store().write_note("command", {"command": command})
    if stage == "all":
        _show(find_removal(study.open_store()))


def has_scores(study: Study) -> bool:
    """Is every trial of the scoring study scored?"""
    try:
        scored = Store(study.store).scored(math.inf)
    except StoreError:
        return False
    return set(study.target.wanted()) <= set(scored)


def score_first(study: Study, resources: Resources) -> None:
    """Train and score what memorization is measured with, unless that is done."""
    click.echo(study.examples.describe())
    if not has_scores(study):
        study.train(resources)
        study.score()
    store = study.open_store()
    click.echo(f"memorization: {len(store.scored(math.inf)):,} trials in {store.url}")


def _show(found: Removed) -> None:
    click.echo("\n" + removal_text(found))
    click.echo(f"\nremoval: {write_removal(found)}")
