"""The command line of removal and leave-one-out experiments: scores first, then the trials that
leave out what the scores choose."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import click

from raymem.cli.job_settings import DataSettings, JobSettings, recipe_option
from raymem.cli.options import run_command, stage_argument
from raymem.data import Examples
from raymem.errors import StoreError
from raymem.experiments import Experiment, LeaveOneOut, Removal
from raymem.fleet import Resources
from raymem.links import (
    find_leave_one_out,
    find_removal,
    leave_one_out_by_scores,
    removal_by_scores,
)
from raymem.settings import Setting
from raymem.show import (
    leave_one_out_text,
    removal_text,
    write_leave_one_out,
    write_removal,
    write_report,
)
from raymem.show.dry_run import planned
from raymem.store import Store, parse_part
from raymem.study import Study
from raymem.training import Recipe


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings(DataSettings, ABC):
    """The experiment."""

    kind: ClassVar[Literal["removal", "leave-one-out"]]

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
    repeats: Annotated[int, Setting(least=1)] = 10
    """Models of each kind; can be raised later."""

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

    @abstractmethod
    def experiment(self, scoring: Study, source: str) -> Experiment:
        """What its trials leave out, by the scores of the store `source`."""

    @abstractmethod
    def show(self, store: Store) -> None:
        """Print and write what the experiment in `store` found."""

    def study(self, scoring: Study, source: str) -> Study:
        """The experiment, of examples chosen by the scores of the store `source`."""
        experiment = self.experiment(scoring, source)
        of: dict[str, Any] = {self.kind.replace("-", "_"): experiment}
        return dataclasses.replace(
            scoring,
            store=self.store,
            kind=self.kind,
            **of,
            subset_ratio=1,
            trials=self.repeats * experiment.block,
            part=self.part,
        )

    @property
    def fixed(self) -> set[str]:
        """Fields that are no options: where images come from, if the job made them itself."""
        own = {"data", "data_root", "download", "image_size"}
        return own if isinstance(self.data, Examples) else set()


@dataclass(frozen=True, kw_only=True)
class RemovalSettings(ExperimentSettings):
    """The removal experiment."""

    kind = "removal"
    sizes: Annotated[tuple[int, ...], Setting(form="NUMBERS")] = (10, 20, 40, 80)
    """Numbers of training examples that are removed."""
    repeats: Annotated[int, Setting(least=1)] = 10
    """Models for each size and each way to choose what is removed; can be raised later."""

    def experiment(self, scoring: Study, source: str) -> Removal:
        """The most memorized examples, and random ones."""
        return removal_by_scores(scoring.examples, source, self.sizes)

    def show(self, store: Store) -> None:
        """The effect on test accuracy."""
        found = find_removal(store)
        click.echo("\n" + removal_text(found))
        click.echo(f"\nremoval: {write_removal(found)}")


@dataclass(frozen=True, kw_only=True)
class LeaveOneOutSettings(ExperimentSettings):
    """The leave-one-out experiment."""

    kind = "leave-one-out"
    examples: Annotated[int, Setting(option="leave-one-out", least=3, form="K")] = 48
    """Number of examples that are left out, one by one."""
    repeats: Annotated[int, Setting(least=2)] = 20
    """Models on everything, and without each example; can be raised later."""

    def experiment(self, scoring: Study, source: str) -> LeaveOneOut:
        """Examples that half of the trials choose."""
        return leave_one_out_by_scores(scoring.examples, source, self.examples, seed=self.seed)

    def show(self, store: Store) -> None:
        """Bias and correlation of the scores; in the report too, if the job made the scores."""
        found = find_leave_one_out(store)
        click.echo("\n" + leave_one_out_text(found))
        click.echo(f"\nleave one out: {write_leave_one_out(found)}")
        if self.scores_from is None:
            scores = f"{self.store.rstrip('/')}_scores"
            report = write_report(scores, self.load_examples(), leave_one_out=store.url)
            click.echo(f"report: {report}")


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
    _run_job(settings, recipes, arguments)


def run_leave_one_out_job(
    settings: LeaveOneOutSettings,
    recipes: Recipe | Mapping[str, Recipe],
    *,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a leave-one-out experiment, each of whose `settings` an option can change; of several
    `recipes`, --recipe chooses one.

    `settings.trials` models go to STORE_scores, unless --scores-from names a scored store; then, in
    each repeat, one model on all examples and one without each of `settings.examples` examples go
    to STORE. Exits as `run_command` does.
    """
    _run_job(settings, recipes, arguments)


def _run_job(
    settings: ExperimentSettings,
    recipes: Recipe | Mapping[str, Recipe],
    arguments: Sequence[str] | None,
) -> None:
    def work(
        given: ExperimentSettings, resources: Resources, stage: str, recipe: str | None = None
    ) -> None:
        chosen = recipes if isinstance(recipes, Recipe) else recipes[str(recipe)]
        _run(given, given.scoring(chosen), resources, stage)

    stages = ("all", "plan", "scores", "train", settings.kind)
    params = [stage_argument(stages), *recipe_option(recipes)]
    run_command(
        work, settings, Resources(), skip=settings.fixed, params=params, arguments=arguments
    )


def _run(settings: ExperimentSettings, scoring: Study, resources: Resources, stage: str) -> None:
    """One stage, or all of them in turn."""
    threads, own = resources.cpus_per_trial, settings.scores_from is None
    if own and stage in ("all", "scores"):
        _score(scoring, resources)
    if stage == "scores":
        return
    if stage == settings.kind:
        settings.show(Store(settings.store))
        return
    if stage == "plan" and own and not _has_scores(scoring):
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
        settings.show(study.open_store())


def _has_scores(study: Study) -> bool:
    """Is every trial of the scoring study scored?"""
    try:
        scored = Store(study.store).scored(math.inf)
    except StoreError:
        return False
    return set(study.target.wanted()) <= set(scored)


def _score(study: Study, resources: Resources) -> None:
    """Train and score what memorization is measured with, unless that is done."""
    click.echo(study.examples.describe())
    if not _has_scores(study):
        study.train(resources)
        study.score()
    store = study.open_store()
    click.echo(f"memorization: {len(store.scored(math.inf)):,} trials in {store.url}")
