"""The command line of a leave-one-out experiment: scores first, then trials without one example."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from raymem.cli.base import absolute_store, command_errors
from raymem.cli.job_options import JobOptions, Machine, PartOf, data_options, machine_options
from raymem.cli.job_removal import has_scores, score_first
from raymem.links import find_leave_one_out, leave_one_out_by_scores
from raymem.show import leave_one_out_text, write_leave_one_out, write_report
from raymem.show.dry_run import planned
from raymem.store import Store
from raymem.study import Study

STAGES = ("all", "plan", "scores", "train", "leave-one-out")


def run_leave_one_out_job(
    build: Callable[[JobOptions], Study],
    *,
    data: str,
    store: str,
    trials: int,
    examples: int,
    repeats: int,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a leave-one-out experiment: `build` makes the study that scores memorization from the
    options, whose defaults are given here.

    Its `trials` go to STORE_scores, unless --scores-from names a scored store; then `repeats` times
    one model on all examples, and one without each of `examples` examples, go to STORE.

    Exits with 0 when done, 1 on failure, 2 on wrong usage, 3 if another driver holds the store, 4
    without space.
    """

    @click.command(
        help=(sys.modules[build.__module__].__doc__ or "").replace("\n\n", "\n\n\b\n"),
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    @click.argument("stage", type=click.Choice(STAGES), default="all")
    @data_options(data)
    @click.option("--store", default=store, help="Folder or URL of the experiment.")
    @click.option(
        "--scores-from",
        help="A scored store of the same examples, by which they are chosen and with which the "
        "result is compared.  [default: STORE_scores, trained first]",
    )
    @click.option(
        "--trials",
        type=click.IntRange(20),
        default=trials,
        help="Models that score memorization in STORE_scores: half choose, half are compared.",
    )
    @click.option(
        "--leave-one-out",
        metavar="K",
        type=click.IntRange(3),
        default=examples,
        help="Number of examples that are left out, one by one.",
    )
    @click.option(
        "--repeats",
        type=click.IntRange(2),
        default=repeats,
        help="Models on everything, and without each example; can be raised later.",
    )
    @click.option("--part", type=PartOf(), help="Train only part K/N of the repeats, such as 1/2.")
    @click.option("--seed", type=click.IntRange(0), default=0, help="Random seed.")
    @machine_options
    def command(
        stage: str,
        store: str,
        scores_from: str | None,
        leave_one_out: int,
        repeats: int,
        part: tuple[int, int] | None,
        checkpoint_minutes: float,
        debug: bool,
        **settings: Any,
    ) -> None:
        with command_errors(debug):
            machine = Machine(**{f.name: settings.pop(f.name) for f in dataclasses.fields(Machine)})
            place = absolute_store(store)
            scoring = build(
                JobOptions(
                    **settings,
                    store=f"{place.rstrip('/')}_scores",
                    subset_ratio=0.7,
                    kind="balanced",
                    checkpoint_seconds=60 * checkpoint_minutes,
                )
            )
            own = scores_from is None
            source = str(scoring.store)
            if scores_from is not None:
                source = absolute_store(scores_from, "--scores-from")
            elif stage in ("all", "scores"):
                score_first(scoring, machine)
            if stage == "scores":
                return
            if stage == "leave-one-out":
                _show(Store(place), scoring if own else None)
                return
            if stage == "plan" and own and not has_scores(scoring):
                click.echo("First, the trials that score memorization:")
                click.echo(planned(scoring, threads=machine.cpus_per_trial))
                return
            experiment = leave_one_out_by_scores(
                scoring.examples, source, leave_one_out, seed=scoring.seed
            )
            study = dataclasses.replace(
                scoring,
                store=place,
                kind="leave-one-out",
                leave_one_out=experiment,
                subset_ratio=1,
                trials=repeats * experiment.block,
                part=part,
            )
            if stage == "plan":
                click.echo(planned(study, threads=machine.cpus_per_trial))
                return
            study.train(**vars(machine))
            command_line = shlex.join(["python", *sys.argv])
            study.open_store().write_note("command", {"command": command_line})
            if stage == "all":
                _show(study.open_store(), scoring if own else None)

    command.main(args=None if arguments is None else list(arguments), standalone_mode=True)


def _show(store: Store, scoring: Study | None) -> None:
    """Print and write what was found; `scoring` is the job's own, whose report has it too."""
    found = find_leave_one_out(store)
    click.echo("\n" + leave_one_out_text(found))
    click.echo(f"\nleave one out: {write_leave_one_out(found)}")
    if scoring is not None:
        report = write_report(scoring.store, scoring.examples, leave_one_out=store.url)
        click.echo(f"report: {report}")
