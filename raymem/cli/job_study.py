"""The command line of a job file: its study's settings as options, its stages as an argument."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import click
from click.core import ParameterSource

from raymem.cli.base import absolute_store, command_errors
from raymem.cli.job_cache import CacheOptions, cache_options, ready_cache
from raymem.cli.job_options import (
    JobOptions,
    Machine,
    curvature_options,
    machine_options,
    plan_options,
    pool_options,
    privacy_options,
    recipe_option,
    study_options,
)
from raymem.cli.smoke import Smoke, check_rows
from raymem.curvature import CurvatureRule, PaperRule
from raymem.encoding import epsilon_name
from raymem.fleet import duration
from raymem.privacy import Privacy
from raymem.scores import PairRule, Until
from raymem.show import as_text, for_people, pairs_for_people, summary_text, top, where
from raymem.show.dry_run import Cluster, planned
from raymem.store import Store
from raymem.study import Study
from raymem.training import Recipe

STAGES = ("all", "plan", "train", "repeat", "curvature", "score", "links", "report")
# A trial that takes longer is trained again only when asked to.
SHORT_TRIAL = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateStudy:
    """A second study of a job: the same examples under differential privacy, for links 2 and 3."""

    recipe: Recipe
    """How its models are trained; not that of the first study, whose fit privacy would ruin."""
    trials: int
    """At each epsilon."""
    epsilons: tuple[float, ...]
    curvature_trials: int | None = None
    subset_ratio: float = 0.5

    def options(self, first: JobOptions, trials: int) -> JobOptions:
        """The second study's, from those of the first: its store is STORE_private."""
        return dataclasses.replace(
            first,
            store=f"{first.store.rstrip('/')}_private",
            trials=trials,
            subset_ratio=self.subset_ratio,
            kind="balanced",
            epsilons=self.epsilons,
            privacy=first.privacy or Privacy(),
            curvature_trials=None if first.curvature is None else self.curvature_trials,
            recipe=None,
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
    curvature_at: Literal["trial", "stage"] = "trial",
    curvature_trials: int | None = None,
    epsilons: str | None = None,
    flip_labels: float = 0.0,
    pool_size: int | None = None,
    cache: bool = False,
    smoke: Smoke | None = None,
    private: PrivateStudy | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a job file: `build` makes the study from the options, whose defaults are given here.

    `recipes` adds an option --recipe to choose one by name, the first by default. `curvature` says
    if it is measured unless --no-curvature (or --curvature) is given, `curvature_at` when, in the
    first `curvature_trials`. `epsilons` are the privacy budgets, a grid's name or numbers; without,
    trials are not private unless --epsilons is given. `flip_labels` is the share of training labels
    made wrong on purpose. `pool_size` adds --pool-from: the candidates are an earlier study's most
    memorized examples. `cache` adds the stage `ingest`, which makes a cache of shards first.
    `smoke` adds --smoke: the whole chain on a few images that it makes itself. `private` is a
    second study that every stage runs after the first; the first one's report shows both.

    Exits with 0 when done, 1 on failure, 2 on wrong usage, 3 if another driver holds the store, 4
    without space.
    """
    stages = (*STAGES[:1], "ingest", *STAGES[1:]) if cache else STAGES

    @click.command(
        help=(sys.modules[build.__module__].__doc__ or "").replace("\n\n", "\n\n\b\n"),
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    @click.argument("stage", type=click.Choice(stages), default="all")
    @study_options(
        data=data,
        store=store,
        trials=trials,
        subset_ratio=subset_ratio,
        seed=seed,
        flipped=flip_labels,
    )
    @recipe_option(recipes or {})
    @curvature_options(on=curvature, at=curvature_at, trials=curvature_trials)
    @privacy_options(epsilons=epsilons)
    @pool_options(pool_size)
    @cache_options(cache)
    @smoke_option(smoke)
    @private_option(private)
    @plan_options
    @machine_options
    def command(stage: str, debug: bool, **settings: Any) -> None:
        with command_errors(debug):
            machine = Machine(**{f.name: settings.pop(f.name) for f in dataclasses.fields(Machine)})
            way = Way(
                machine=machine,
                rule=PairRule(max_pairs=settings.pop("max_pairs")),
                until=settings.pop("until"),
                cluster=Cluster(
                    machines=settings.pop("machines"),
                    at_once=settings.pop("trials_at_once") or machine.max_workers,
                    times_faster=settings.pop("times_faster"),
                    price=settings.pop("price"),
                ),
            )
            caching = CacheOptions.taken_from(settings)
            if settings.pop("smoke", False) and smoke is not None:
                caching = smoke.prepare(settings)
            private_trials = settings.pop("private_trials", 0)
            options = _options(settings, recipes or {})
            if caching is not None:
                make = stage in ("all", "ingest")
                options = ready_cache(options, caching, machine, make=make)
            if stage != "ingest":
                study, second = build(options), None
                if private is not None and private_trials:
                    second = private.options(options, private_trials).study(private.recipe)
                run_stages(study, stage, way, second)
                if smoke is not None and options.recipe is smoke.recipe:
                    click.echo(check_rows(study))

    command.main(args=None if arguments is None else list(arguments), standalone_mode=True)


def smoke_option(smoke: Smoke | None) -> Callable[[Any], Any]:
    """--smoke, for jobs that have it."""
    if smoke is None:
        return lambda function: function
    return click.option(
        "--smoke",
        is_flag=True,
        help="The whole chain in minutes, on a few small images made here, in a new --store.",
    )


def private_option(private: PrivateStudy | None) -> Callable[[Any], Any]:
    """--private-trials, for jobs that have a private study too."""
    if private is None:
        return lambda function: function
    return click.option(
        "--private-trials",
        type=click.IntRange(0),
        default=private.trials,
        help="Models at each epsilon "
        f"({', '.join(map(epsilon_name, private.epsilons))}) of the private study in "
        "STORE_private; 0: none.",
    )


def _options(settings: dict[str, Any], recipes: Mapping[str, Recipe]) -> JobOptions:
    mode, step = settings.pop("curvature_mode"), settings.pop("paper_step")
    on, every = settings.pop("curvature"), settings.pop("curvature_epochs")
    precision = settings.pop("curvature_precision")
    if every is not None and not on:
        raise click.UsageError("--curvature-epochs needs --curvature")
    rule = None
    if on:
        rule = CurvatureRule(
            mode=cast(Any, mode),
            precision=precision,
            paper=PaperRule(step=step),
            every_epochs=every,
        )
    recipe = settings.pop("recipe", None)
    pool_from, pool_size = settings.pop("pool_from", None), settings.pop("pool_size", None)
    if pool_from is not None:
        settings["pool"] = (absolute_store(pool_from, "--pool-from"), pool_size)
    names = [f.name for f in dataclasses.fields(Privacy)]
    privacy = Privacy(**{name: settings.pop(name) for name in names})
    if settings["epsilons"] is None:
        del settings["epsilons"]
    else:
        settings["privacy"] = privacy
    seconds = 60 * settings.pop("checkpoint_minutes")
    settings["store"] = absolute_store(settings["store"])
    if settings["curvature_data"]:
        settings["curvature_data"] = absolute_store(settings["curvature_data"], "--curvature-data")
    if not on:
        # A job's default; asked for without curvature it is the user's mistake, which Study names.
        context = click.get_current_context()
        if context.get_parameter_source("curvature_trials") is ParameterSource.DEFAULT:
            settings["curvature_trials"] = None
    return JobOptions(
        **settings,
        recipe=recipe if isinstance(recipe, Recipe) else recipes.get(recipe or ""),
        curvature=rule,
        checkpoint_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How stages are run: no part of what the study is."""

    machine: Machine
    rule: PairRule
    cluster: Cluster
    """What `plan` counts for."""
    until: Until | None = None
    """When training has enough trials, before all of them are done."""


def run_stages(study: Study, stage: str, way: Way, private: Study | None = None) -> None:
    """One stage, or all of them in turn; of the private study too, before the report of both."""
    _run(study, stage, way)
    if private is not None:
        click.echo("\nThe same examples under differential privacy:")
        _run(private, stage, dataclasses.replace(way, until=None))
    if stage in ("all", "report"):
        from raymem.show import write_report

        for each, other in ((private, None), (study, private)):
            if each is not None:
                where = write_report(
                    each.store, each.examples, private=None if other is None else other.store
                )
                click.echo(f"report:  {where}")
    if stage == "all" and (study.curvature or study.privacy or private):
        click.echo(conclusions(study.open_store()))


def conclusions(store: Store) -> str:
    """The verdicts of links.json: what a run ends with."""
    from raymem.links import Verdict

    verdicts = (store.note("links") or {}).get("verdicts", [])
    lines = [
        str(Verdict(text=said["text"], not_shown=said["not_shown"] or "")) for said in verdicts
    ]
    return "\nWhat these trials show, and what they do not:\n" + "\n".join(lines)


def _run(study: Study, stage: str, way: Way) -> None:
    machine = way.machine
    if stage == "plan":
        click.echo(
            planned(
                study,
                way.cluster,
                threads=machine.cpus_per_trial,
                models_per_step=machine.models_per_step,
            )
        )
        return
    click.echo(study.examples.describe())
    if stage in ("all", "train"):
        if way.until is None:
            progress = study.train(**vars(machine))
        else:
            progress = study.train_until(way.until, on_message=click.echo, **vars(machine))
        # Only now: a run that is refused is not how the store came about.
        command = shlex.join(["python", *sys.argv])
        study.open_store().write_note("command", {"command": command})
        if progress.rate:
            click.echo(
                f"{progress.committed:,} trials trained, one every {duration(1 / progress.rate)}"
            )
    if stage in ("all", "repeat"):
        _repeat(study, machine, asked=stage == "repeat")
    if stage in ("all", "curvature"):
        _measure(study, machine, asked=stage == "curvature")
    if stage in ("all", "score"):
        score_and_print(study, way.rule)
    if stage in ("all", "links"):
        links_and_print(study)


def _repeat(study: Study, machine: Machine, *, asked: bool) -> None:
    """Train one trial again and compare, once; a long one, or once more, only when asked to."""
    known = study.open_store().note("repeat") is not None
    if not asked and (known or study.seconds_of_a_trial() > SHORT_TRIAL):
        return
    click.echo(study.repeat(threads=machine.cpus_per_trial).text)


def _measure(study: Study, machine: Machine, *, asked: bool) -> None:
    done = study.measure_curvature(
        engine=machine.engine,
        gpus_per_scorer=machine.gpus_per_trial,
        threads=machine.cpus_per_trial,
        verbose=machine.verbose,
    )
    if done is None:
        if asked:
            click.echo(
                "nothing to do: curvature is measured in the trials, or not at all; see "
                "--curvature-at"
            )
        return
    click.echo(str(done))


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
    click.echo(f"\nscores:  {store.files.path('scores/examples.parquet')}")
    click.echo(f"pairs:   {store.files.path('scores/influence.parquet')}")
    click.echo(f"trials:  {store.files.path('scores/trials.parquet')}")
    click.echo(f"look at: raymem scores {store.url} --top 20")


def links_and_print(study: Study) -> None:
    """The links stage: links.json, and what it says. Nothing for studies that ask for neither."""
    store = study.open_store()
    if study.curvature is None and study.privacy is None:
        return
    # Not at the top: training would start seconds later.
    from raymem.links import find_links
    from raymem.show import links_text

    found = find_links(store)
    store.write_note("links", found.as_dict())
    click.echo("\n" + links_text(found, brief=True))
    click.echo(f"\nlinks:   {store.files.path('links.json')}")
