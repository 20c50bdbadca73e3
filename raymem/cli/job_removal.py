"""The command line of a removal experiment: scores first, then trials without the memorized."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from raymem.cli.base import absolute_store, command_errors
from raymem.cli.job_options import (
    JobOptions,
    Machine,
    PartOf,
    data_options,
    machine_options,
    recipe_option,
)
from raymem.errors import StoreError
from raymem.links import Removed, find_removal, removal_by_scores
from raymem.show import removal_text, write_removal
from raymem.show.dry_run import planned
from raymem.store import Store
from raymem.study import Study
from raymem.training import Recipe

STAGES = ("all", "plan", "scores", "train", "removal")


class Sizes(click.ParamType[tuple[int, ...]]):
    """Numbers of examples between commas."""

    name = "sizes"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Raises click.BadParameter for what is not that."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 10,20,40", param, ctx)


def run_removal_job(
    build: Callable[[JobOptions], Study],
    *,
    data: str,
    store: str,
    trials: int,
    sizes: tuple[int, ...],
    repeats: int,
    recipes: Mapping[str, Recipe],
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a removal experiment (Feldman & Zhang 2020, section 4): `build` makes the study that
    scores memorization from the options, whose defaults are given here.

    Its `trials` go to STORE_scores, unless --scores-from names a scored store; then `repeats` times
    one model on all examples, and one of each arm at each of `sizes`, go to STORE.

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
        help="A scored store of the same examples, whose most memorized ones are left out.  "
        "[default: STORE_scores, trained first]",
    )
    @click.option(
        "--trials",
        type=click.IntRange(20),
        default=trials,
        help="Models that score memorization in STORE_scores.",
    )
    @click.option(
        "--sizes",
        type=Sizes(),
        default=",".join(map(str, sizes)),
        help="How many examples are left out.",
    )
    @click.option(
        "--repeats",
        type=click.IntRange(1),
        default=repeats,
        help="Models of each arm and size; can be raised later.",
    )
    @click.option("--part", type=PartOf(), help="Train only part K/N of the repeats, such as 1/2.")
    @click.option("--seed", type=click.IntRange(0), default=0, help="Random seed.")
    @recipe_option(recipes)
    @machine_options
    def command(
        stage: str,
        store: str,
        scores_from: str | None,
        sizes: tuple[int, ...],
        repeats: int,
        part: tuple[int, int] | None,
        recipe: str,
        checkpoint_minutes: float,
        debug: bool,
        **settings: Any,
    ) -> None:
        with command_errors(debug):
            machine = Machine(**{f.name: settings.pop(f.name) for f in dataclasses.fields(Machine)})
            place = absolute_store(store)
            options = JobOptions(
                **settings,
                store=f"{place.rstrip('/')}_scores",
                subset_ratio=0.7,
                kind="balanced",
                recipe=recipes[recipe],
                checkpoint_seconds=60 * checkpoint_minutes,
            )
            scoring = build(options)
            source = scoring.store
            if scores_from is not None:
                source = absolute_store(scores_from, "--scores-from")
            elif stage in ("all", "scores"):
                score_first(scoring, machine)
            if stage == "scores":
                return
            if stage == "removal":
                _show(find_removal(Store(place)))
                return
            if stage == "plan" and scores_from is None and not has_scores(scoring):
                click.echo("First, the trials that score memorization:")
                click.echo(planned(scoring, threads=machine.cpus_per_trial))
                return
            removal = removal_by_scores(scoring.examples, source, sizes)
            study = dataclasses.replace(
                scoring,
                store=place,
                kind="removal",
                removal=removal,
                subset_ratio=1,
                trials=repeats * removal.block,
                part=part,
            )
            if stage == "plan":
                click.echo(planned(study, threads=machine.cpus_per_trial))
                return
            study.train(**vars(machine))
            command_line = shlex.join(["python", *sys.argv])
            study.open_store().write_note("command", {"command": command_line})
            if stage == "all":
                _show(find_removal(study.open_store()))

    command.main(args=None if arguments is None else list(arguments), standalone_mode=True)


def has_scores(study: Study) -> bool:
    """Is every trial of the scoring study scored?"""
    try:
        scored = Store(study.store).scored(math.inf)
    except StoreError:
        return False
    return set(study.target.wanted()) <= set(scored)


def score_first(study: Study, machine: Machine) -> None:
    """Train and score what memorization is measured with, unless that is done."""
    click.echo(study.examples.describe())
    if not has_scores(study):
        study.train(**vars(machine))
        study.score()
    store = study.open_store()
    click.echo(f"memorization: {len(store.scored(math.inf)):,} trials in {store.url}")


def _show(found: Removed) -> None:
    click.echo("\n" + removal_text(found))
    click.echo(f"\nremoval: {write_removal(found)}")
