"""The command line of a job file: its study's settings as options, its stages as an argument."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence

import click
from click.core import ParameterSource

from raymem.cli.job_settings import JobSettings, RunOptions, recipe_option, with_cache
from raymem.cli.options import run_command, stage_argument
from raymem.cli.smoke import Smoke, check_rows
from raymem.fleet import Resources, duration
from raymem.scores import PairRule
from raymem.show import as_text, for_people, pairs_for_people, summary_text, top, where
from raymem.show.dry_run import planned
from raymem.store import Store
from raymem.study import Study
from raymem.training import Recipe

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
    """One stage, or all of them in turn; of the private study too, before the report of both."""
    _run(study, stage, run)
    if private is not None:
        click.echo("\nThe same examples under differential privacy:")
        _run(private, stage, dataclasses.replace(run, until=None))
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


def _run(study: Study, stage: str, run: RunOptions) -> None:
    resources = run.resources
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
        return
    click.echo(study.examples.describe())
    if stage in ("all", "train"):
        if run.until is None:
            progress = study.train(resources)
        else:
            progress = study.train_until(run.until, resources, on_message=click.echo)
        # Only now: a run that is refused is not how the store came about.
        command = shlex.join(["python", *sys.argv])
        study.open_store().write_note("command", {"command": command})
        if progress.rate:
            click.echo(
                f"{progress.committed:,} trials trained, one every {duration(1 / progress.rate)}"
            )
    if stage in ("all", "repeat"):
        _repeat(study, resources, asked=stage == "repeat")
    if stage in ("all", "curvature"):
        _measure(study, resources, asked=stage == "curvature")
    if stage in ("all", "score"):
        score_and_print(study, run.pairs)
    if stage in ("all", "links"):
        links_and_print(study)


def _repeat(study: Study, resources: Resources, *, asked: bool) -> None:
    """Train one trial again and compare, once; a long one, or once more, only when asked to."""
    known = study.open_store().note("repeat") is not None
    if not asked and (known or study.seconds_of_a_trial() > SHORT_TRIAL):
        return
    click.echo(study.repeat(threads=resources.cpus_per_trial).text)


def _measure(study: Study, resources: Resources, *, asked: bool) -> None:
    done = study.measure_curvature(
        engine=resources.engine,
        gpus_per_scorer=resources.gpus_per_trial,
        threads=resources.cpus_per_trial,
        verbose=resources.verbose,
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
