"""The command line of a leave-one-out experiment: scores first, then trials without one example."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import click

from raymem.cli.job_removal import ExperimentSettings, has_scores, score_first
from raymem.cli.options import run_command, stage_argument
from raymem.fleet import Resources
from raymem.links import find_leave_one_out, leave_one_out_by_scores
from raymem.settings import Setting
from raymem.show import leave_one_out_text, write_leave_one_out, write_report
from raymem.show.dry_run import planned
from raymem.store import Store
from raymem.study import Study
from raymem.training import Recipe

STAGES = ("all", "plan", "scores", "train", "leave-one-out")


@dataclass(frozen=True, kw_only=True)
class LeaveOneOutSettings(ExperimentSettings):
    """The leave-one-out experiment."""

    examples: Annotated[int, Setting(option="leave-one-out", least=3, form="K")] = 48
    """Number of examples that are left out, one by one."""
    repeats: Annotated[int, Setting(least=2)] = 20
    """Models on everything, and without each example; can be raised later."""

    def study(self, scoring: Study, source: str) -> Study:
        """The experiment, of examples chosen by half the trials of the store `source`."""
        experiment = leave_one_out_by_scores(
            scoring.examples, source, self.examples, seed=scoring.seed
        )
        return dataclasses.replace(
            scoring,
            store=self.store,
            kind="leave-one-out",
            leave_one_out=experiment,
            subset_ratio=1,
            trials=self.repeats * experiment.block,
            part=self.part,
        )


def run_leave_one_out_job(
    settings: LeaveOneOutSettings, recipe: Recipe, *, arguments: Sequence[str] | None = None
) -> None:
    """Run a leave-one-out experiment, each of whose `settings` an option can change.

    `settings.trials` models go to STORE_scores, unless --scores-from names a scored store; then, in
    each repeat, one model on all examples and one without each of `settings.examples` examples go
    to STORE. Exits as `run_command` does.
    """

    def work(given: LeaveOneOutSettings, resources: Resources, stage: str) -> None:
        run_leave_one_out(given, given.scoring(recipe), resources, stage)

    run_command(
        work,
        settings,
        Resources(),
        skip=settings.fixed,
        params=[stage_argument(STAGES)],
        arguments=arguments,
    )


def run_leave_one_out(
    settings: LeaveOneOutSettings, scoring: Study, resources: Resources, stage: str
) -> None:
    """One stage, or all of them in turn."""
    threads, own = resources.cpus_per_trial, settings.scores_from is None
    if own and stage in ("all", "scores"):
        score_first(scoring, resources)
    if stage == "scores":
        return
    if stage == "leave-one-out":
        _show(Store(settings.store), scoring if own else None)
        return
    if stage == "plan" and own and not has_scores(scoring):
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
        _show(study.open_store(), scoring if own else None)


def _show(store: Store, scoring: Study | None) -> None:
    """Print and write what was found; `scoring` is the job's own, whose report has it too."""
    found = find_leave_one_out(store)
    click.echo("\n" + leave_one_out_text(found))
    click.echo(f"\nleave one out: {write_leave_one_out(found)}")
    if scoring is not None:
        report = write_report(scoring.store, scoring.examples, leave_one_out=store.url)
        click.echo(f"report: {report}")
