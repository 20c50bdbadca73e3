"""Settings of a job: what its study is of, and how this machine or cluster runs it.

A job file makes a `JobSettings` with its defaults; each field is an option (see options.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import click

from raymem.cli.base import absolute_store
from raymem.cli.exchange import CacheImages
from raymem.curvature.streaming import ScorerOptions
from raymem.data import (
    Examples,
    add_canaries,
    draw_training,
    flip_labels,
    holds_cache,
    load_examples,
)
from raymem.data.shards import ingest
from raymem.errors import ExamplesError
from raymem.fleet import Resources
from raymem.privacy import Privacy, parse_epsilons
from raymem.scores import PairRule, Until
from raymem.settings import Setting
from raymem.show import ingest_text
from raymem.show.dry_run import Cluster
from raymem.study import Study, StudySettings
from raymem.training import Recipe, private_recipe

# What `Resources` say for the whole study, and what few need.
NOT_IN_STUDIES = ("engine", "scorers", "gpus_per_scorer", "batch_size", "threads", "verbose")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data set."""

    data: str | Examples
    """A set by name (digits, mnist, fashion-mnist, cifar10, cifar100), an .npz file, a folder with
    one folder per class, or a cache made by `raymem ingest`."""
    data_root: str = "data"
    """Folder of torchvision's files, for sets by name."""
    download: bool = False
    """Let torchvision download the set."""
    image_size: Annotated[int | None, Setting(least=1)] = None
    """Resize the images of a folder to squares with sides of this many pixels; None: as they
    are."""
    train_examples: Annotated[int | None, Setting(least=1)] = None
    """Take only this many of the training examples, drawn by their ids; None: all."""
    flip_labels: Annotated[float, Setting(least=0, most=0.5)] = 0.0
    """Share of the training labels that are made wrong on purpose."""
    canaries: Annotated[int, Setting(least=0)] = 0
    """Add this many training examples of noise with random labels, for the audit of privacy, such
    as 200."""

    def load_examples(self) -> Examples:
        """The data set, with flipped labels and canaries if that is asked for."""
        examples = self.data
        if not isinstance(examples, Examples):
            examples = load_examples(
                examples,
                data_root=self.data_root,
                download=self.download,
                image_size=self.image_size,
            )
        if self.train_examples is not None:
            examples = draw_training(examples, self.train_examples)
        if self.flip_labels:
            examples = flip_labels(examples, self.flip_labels)
        return add_canaries(examples, self.canaries) if self.canaries else examples


@dataclass(frozen=True, kw_only=True)
class CacheSettings(CacheImages):
    """The cache: what a job on a large set trains from."""

    cache: Annotated[str | None, Setting(path=True)] = None
    """Make a cache of --data in this folder or URL first; None: --data is one."""


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Candidates from an earlier study."""

    pool_from: Annotated[str | None, Setting(path=True)] = None
    """Store of an earlier study of the same set: only its most memorized examples are drawn at
    random, all others are in every subset; None: all examples are drawn."""
    pool_size: Annotated[int, Setting(least=1)] = 500
    """How many of its most memorized examples."""
    rest_ratio: Annotated[float, Setting(least=0, most=1, above_least=True)] = 1.0
    """Share of the other examples that each model sees."""


@dataclass(frozen=True, kw_only=True)
class PrivateStudy:
    """The private study: the same examples under differential privacy, for links 2 and 3."""

    recipe: Annotated[Recipe, Setting(option="")]
    """How its models are trained; not that of the first study, whose fit privacy would ruin."""
    trials: Annotated[int, Setting(least=0)]
    """Models at each epsilon of the private study in STORE_private; 0 for no private study."""
    epsilons: Annotated[
        tuple[float, ...],
        Setting(parse=parse_epsilons, form="NUMBERS|GRID", option="epsilons"),
    ]
    """Privacy budgets of the private study: numbers such as 0.5,2,8,inf, or a grid (default, quick,
    paper-curvature, paper-memorization)."""
    privacy: Privacy = field(default_factory=Privacy)
    """How its trials are made private."""
    subset_ratio: float = 0.5
    """Share of the training examples that each of its models sees."""
    curvature_trials: Annotated[int | None, Setting(least=1)] = None
    """Measure curvature in the first this many trials at each epsilon; None: in all."""

    def study(self, first: JobSettings) -> Study:
        """The second study of a job whose first one has the settings `first`."""
        second = dataclasses.replace(
            first,
            store=f"{str(first.store).rstrip('/')}_private",
            trials=self.trials,
            subset_ratio=self.subset_ratio,
            kind="balanced",
            epsilons=self.epsilons,
            privacy=self.privacy,
            curvature_trials=None if first.curvature is None else self.curvature_trials,
        )
        return second.study(self.recipe)


@dataclass(frozen=True, kw_only=True)
class JobSettings(StudySettings, DataSettings):
    """A job: its data set, its study, and what only some jobs have.

    >>> settings = JobSettings(data="digits", store="memory://doctest-job", trials=20)
    >>> settings.study(Recipe(model="mlp-8", epochs=1)).examples.describe()
    'digits: 1,200 train and 597 test images, 8x8x1, 10 classes'
    """

    epsilons: Annotated[
        tuple[float, ...] | None,
        Setting(parse=parse_epsilons, form="NUMBERS|GRID", heading="Differential privacy"),
    ] = None
    """Train a model on every subset at each of these privacy budgets: numbers such as 0.5,2,8,inf,
    or a grid (default, quick, paper-curvature, paper-memorization). Models with BatchNorm get
    GroupNorm; None: not private."""
    privacy: Privacy = field(default_factory=Privacy)
    """How trials are made private, with epsilons."""
    pool: PoolSettings | None = None
    """The job can take its candidates from an earlier study."""
    cache: CacheSettings | None = None
    """The job trains from a cache, and can make it."""
    private: Annotated[PrivateStudy | None, Setting(prefix="private-")] = None
    """The job has a second, private study."""

    @property
    def fixed(self) -> set[str]:
        """Fields that are no options: where images come from, if the job made them itself, and
        privacy, if that is the private study's."""
        own = {"data", "data_root", "download", "image_size"}
        return (own if isinstance(self.data, Examples) else set()) | (
            {"epsilons", "privacy"} if self.private is not None else set()
        )

    def study(self, recipe: Recipe) -> Study:
        """The study of these settings.

        With epsilons the recipe is the private one of `recipe` (see `private_recipe`).
        """
        examples = self.load_examples()
        names = [f.name for f in dataclasses.fields(StudySettings)]
        settings = {name: getattr(self, name) for name in names}
        if self.pool is not None and self.pool.pool_from is not None:
            from raymem.links import most_memorized

            known = dataclasses.replace(self, canaries=0).load_examples()
            candidates = most_memorized(known, self.pool.pool_from, self.pool.pool_size)
            settings |= {
                "kind": "candidate-pool",
                "pool": (*candidates, *examples.canaries),
                "rest_ratio": self.pool.rest_ratio,
            }
        if self.epsilons is not None:
            settings |= {"epsilons": self.epsilons, "privacy": self.privacy}
            recipe = private_recipe(
                recipe, n_classes=examples.n_classes, image_shape=examples.image_shape
            )
        return Study(examples=examples, recipe=recipe, **settings)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How stages are run: not part of the study's identity."""

    until: Until | None = None
    """Train until reliability=0.98, or until ci-width=0.1 (the 90th percentile of the widths of
    95% intervals); checked after whole blocks of trials at the largest epsilon, --trials at
    most; None: train all trials."""
    pairs: PairRule = field(default_factory=PairRule)
    """Which influence pairs are kept."""
    cluster: Cluster = field(default_factory=Cluster)
    """What `plan` plans for."""
    resources: Resources = field(default_factory=Resources)
    """What trials run on."""
    scorers: Annotated[ScorerOptions, Setting(without=NOT_IN_STUDIES)] = field(
        default_factory=ScorerOptions
    )
    """What the curvature stage runs on, beside what `resources` say."""

    @property
    def scorer_options(self) -> ScorerOptions:
        """What the curvature stage runs on."""
        return dataclasses.replace(
            self.scorers,
            engine=self.resources.engine,
            gpus_per_scorer=self.resources.gpus_per_trial,
            threads=self.resources.cpus_per_trial,
            verbose=self.resources.verbose,
        )


def recipe_option(recipes: Recipe | Mapping[str, Recipe]) -> list[click.Option]:
    """--recipe, for jobs that have several; the first is the default."""
    if isinstance(recipes, Recipe):
        return []
    names = list(recipes)
    text = "How each model is trained; the recipes are in the job file."
    return [click.Option(["--recipe"], type=click.Choice(names), default=names[0], help=text)]


def with_cache(settings: JobSettings, resources: Resources, *, make: bool) -> JobSettings:
    """`settings` with a cache as their data, made if need be and `make`."""
    cache = settings.cache
    if cache is None:
        return settings
    if cache.cache is None:
        if holds_cache(str(settings.data)):
            return settings
        raise ExamplesError(
            f"{settings.data} is no cache; give --cache, where to make one of it, or make it with "
            "`raymem ingest`"
        )
    if make:
        summary = ingest(
            absolute_store(str(settings.data), "--data"),
            cache.cache,
            size=cache.size,
            on_bad=cache.on_bad,
            val_labels=cache.val_labels,
            engine=resources.engine,
            verbose=resources.verbose,
        )
        click.echo(ingest_text(summary))
    return dataclasses.replace(settings, data=cache.cache)
