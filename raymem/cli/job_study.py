"""The command line of a job file: its study's settings as options, its stages as an argument."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from raymem.cli.job_settings import JobSettings, RunOptions, recipe_option, with_cache
from raymem.cli.options import run_command, stage_argument
from raymem.cli.smoke import Smoke, check_rows
from raymem.curvature.streaming import ScorerOptions
from raymem.encoding import duration, epsilon_name
from raymem.fleet import Resources
from raymem.scores import PairRule
from raymem.show import examples_table, format_table, pairs_table, summary_text, top, where
from raymem.show.dry_run import planned
from raymem.store import Store
from raymem.study import Study
from raymem.training import Recipe

if TYPE_CHECKING:
    from raymem.links import Links

STAGES = ("all", "plan", "train", "repeat", "curvature", "score", "links", "report")
# A trial that takes longer is trained again only when asked to.
SHORT_TRIAL = 60.0


def run_job(
    settings: JobSettings,
    recipes: Recipe | Mapping[str, Recipe],
    *,
    smoke: Smoke | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a job file: the study of `settings`, each of which an option can change.

    Of several `recipes`, --recipe chooses one by name, the first by default. `settings.cache` adds
    the stage `ingest`, which makes a cache of shards first. With `settings.private` every stage
    runs the private study after the first, and the first one's report shows both. `smoke` adds
    --smoke: the whole chain on a few images that it makes itself. Exits as `run_command` does.
    """
    stages = STAGES if settings.cache is None else (*STAGES[:1], "ingest", *STAGES[1:])

    def work(
        given: JobSettings,
        run: RunOptions,
        stage: str,
        recipe: str | None = None,
        smoke_test: bool = False,
    ) -> None:
        chosen = recipes if isinstance(recipes, Recipe) else recipes[str(recipe)]
        if not given.curvature and not _is_default("curvature_epochs"):
            raise click.UsageError("--curvature-epochs needs --curvature")
        if not given.curvature and _is_default("curvature_trials"):
            # Asked for without curvature it is the user's mistake, which Study names.
            given = dataclasses.replace(given, curvature_trials=None)
        if smoke_test and smoke is not None:
            chosen, keep = smoke.recipe, {n for n in ("store", "trials") if not _is_default(n)}
            given = smoke.prepare(given, keep=keep)
        given = with_cache(given, run.resources, make=stage in ("all", "ingest"))
        if stage == "ingest":
            return
        study = given.study(chosen)
        if study.recipe != chosen:
            click.echo(private_recipe_text(chosen, study.recipe))
        private = given.private and given.private.trials and given.private.study(given)
        run_stages(study, stage, run, private or None)
        if smoke_test:
            click.echo(check_rows(study))

    flag = click.Option(
        ["--smoke", "smoke_test"],
        is_flag=True,
        help="Run the whole chain in minutes, on a few small images made for it, in a new --store.",
    )
    run_command(
        work,
        settings,
        RunOptions(),
        skip=settings.fixed,
        params=[
            stage_argument(stages),
            *recipe_option(recipes),
            *([] if smoke is None else [flag]),
        ],
        arguments=arguments,
    )


def private_recipe_text(asked: Recipe, private: Recipe) -> str:
    """What private training changes in a recipe."""
    names = [f.name for f in dataclasses.fields(Recipe)]
    changed = {name: (getattr(asked, name), getattr(private, name)) for name in names}
    said = [f"{name} {b} in place of {a}" for name, (a, b) in changed.items() if a != b]
    return f"the recipe for private training: {', '.join(said)}"


def _is_default(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source in (None, ParameterSource.DEFAULT)


def run_stages(study: Study, stage: str, run: RunOptions, private: Study | None = None) -> None:
    """One stage, or all of them in turn; of the private study too, before the report of both.

    Links are computed once, in the stage `links`, and handed to the report.
    """
    links = _run(study, stage, run)
    private_links = None
    if private is not None:
        heading("The same examples under differential privacy")
        private_links = _run(private, stage, dataclasses.replace(run, until=None))
    if stage in ("all", "report"):
        _report(study, links, private, private_links)


def _report(
    study: Study, links: Links | None, private: Study | None, private_links: Links | None
) -> None:
    """The reports of both studies, and what the first one says."""
    from raymem.links import find_links, with_private
    from raymem.show import story_text, tell, write_report

    store = study.open_store()
    links = links or find_links(store)
    if private is not None:
        other = private.open_store()
        private_links = private_links or find_links(other)
        where = write_report(private.store, private.examples, links=private_links)
        links = with_private(links, private_links, store, other)
    report = write_report(study.store, study.examples, links=links)
    heading("What was found")
    click.echo(f"{story_text(tell(store, links))}\n")
    click.echo(f"report:  {report}")
    if private is not None:
        click.echo(f"private: {where}")
    click.echo(f"more:    raymem links {store.url}, raymem scores {store.url} --top 20")


def _run(study: Study, stage: str, run: RunOptions) -> Links | None:
    """A study's stages but the report; its links, if they were computed."""
    resources, detailed = run.resources, run.resources.verbose or stage != "all"
    if stage == "plan":
        cluster = run.cluster
        if cluster.at_once is None:
            cluster = dataclasses.replace(cluster, at_once=resources.max_workers)
        click.echo(
            planned(
                study,
                cluster,
                threads=resources.cpus_per_trial,
                models_per_step=resources.models_per_step,
            )
        )
        return None
    click.echo(study.examples.describe())
    if stage in ("all", "train"):
        heading(f"Training of {study.trials:,} models{_at_epsilons(study)}")
        _train(study, run)
    if stage in ("all", "repeat"):
        _repeat(study, resources, asked=stage == "repeat")
    if stage in ("all", "curvature"):
        _measure(study, run.scorer_options, asked=stage == "curvature")
    if stage in ("all", "score"):
        heading("Scores")
        score_and_print(study, run.pairs, detailed=detailed)
    if stage in ("all", "links"):
        return links_and_print(study, detailed=detailed)
    return None


def heading(text: str) -> None:
    """The name of a stage; bold on a terminal."""
    click.secho(f"\n{text}", bold=True)


def _at_epsilons(study: Study) -> str:
    if study.privacy is None:
        return ""
    return f" at each epsilon of {', '.join(map(epsilon_name, study.epsilons))}"


def _train(study: Study, run: RunOptions) -> None:
    if run.until is None:
        progress = study.train(run.resources)
    else:
        progress = study.train_until(run.until, run.resources, on_message=click.echo)
    # Only now: a run that is refused is not how the store came about.
    command = shlex.join(["python", *sys.argv])
    study.open_store().write_note("command", {"command": command})
    if progress.rate:
        click.echo(
            f"{progress.committed:,} trials trained, one every {duration(1 / progress.rate)}"
        )


def _repeat(study: Study, resources: Resources, *, asked: bool) -> None:
    """Train one trial again and compare, once; a long one, or once more, only when asked to."""
    known = study.open_store().note("repeat") is not None
    if not asked and (known or study.seconds_of_a_trial() > SHORT_TRIAL):
        return
    click.echo(study.repeat(threads=resources.cpus_per_trial).text)


def _measure(study: Study, options: ScorerOptions, *, asked: bool) -> None:
    done = study.measure_curvature(options)
    if done is None:
        if asked:
            click.echo(
                "nothing to do: curvature is measured in the trials, or not at all; see "
                "--curvature-at"
            )
        return
    click.echo(str(done))


def score_and_print(study: Study, rule: PairRule, *, detailed: bool = True) -> None:
    """The score stage; `detailed`: the most memorized examples, the strongest pairs, how reliable
    all is, where the files are."""
    summaries = study.score(rule)
    store = Store(study.store)
    if not detailed:
        click.echo(f"scores:  {store.files.path('scores/examples.parquet')}")
        return
    trained = where(study.scores(), "split == train")
    click.echo("\nThe ten most memorized training examples:")
    click.echo(format_table(examples_table(top(trained, "memorization", 10))))
    pairs = study.scores("influence")
    click.echo("\nThe five most influential pairs of a training and a test example:")
    click.echo(format_table(pairs_table(top(pairs, "influence", 5))))
    click.echo("\n" + summary_text(summaries))
    click.echo(f"\nscores:  {store.files.path('scores/examples.parquet')}")
    click.echo(f"pairs:   {store.files.path('scores/influence.parquet')}")
    click.echo(f"trials:  {store.files.path('scores/trials.parquet')}")
    click.echo(f"look at: raymem scores {store.url} --top 20")


def links_and_print(study: Study, *, detailed: bool = True) -> Links | None:
    """The links stage: links.json, and what it says. None for studies that ask for neither."""
    store = study.open_store()
    if study.curvature is None and study.privacy is None:
        return None
    heading("Links between memorization, curvature and privacy")
    # Not at the top: training would start seconds later.
    from raymem.links import find_links
    from raymem.show import links_text

    found = find_links(store)
    store.write_note("links", found)
    if detailed:
        click.echo("\n" + links_text(found))
    click.echo(f"links:   {store.files.path('links.json')}")
    return found
