"""Jobs on large sets: the cache they train from, made of shards first if it is not there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import click

from raymem.cli.base import absolute_store
from raymem.cli.job_options import Decorator, JobOptions, Machine, together
from raymem.data import holds_cache
from raymem.data.shards import ingest
from raymem.errors import ExamplesError
from raymem.show import ingest_text


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How shards become a cache."""

    cache: str | None
    """Where it is to be; None: --data is one already."""
    size: int
    on_bad: Literal["fail", "quarantine"]
    val_labels: str | None

    @classmethod
    def taken_from(cls, settings: dict[str, Any]) -> CacheOptions | None:
        """Those among a command's settings, which lose them; None for jobs without."""
        names = [f.name for f in dataclasses.fields(cls)]
        if names[0] not in settings:
            return None
        return cls(**{name: settings.pop(name) for name in names})


def cache_options(on: bool) -> Decorator:
    """--cache and how it is made, for jobs that train from one."""
    if not on:
        return lambda function: function
    return together(
        click.option(
            "--cache", help="Make a cache of --data here first.  [default: --data is one]"
        ),
        click.option(
            "--size", type=click.IntRange(1), default=128, help="Side of the cache's images."
        ),
        click.option(
            "--on-bad",
            type=click.Choice(["fail", "quarantine"]),
            default="fail",
            help="What to do with images that cannot be read; quarantine leaves them out.",
        ),
        click.option("--val-labels", help="Labels of a flat folder of validation images."),
    )


def ready_cache(
    options: JobOptions, caching: CacheOptions, machine: Machine, *, make: bool
) -> JobOptions:
    """`options` with a cache as their data, made if need be and `make`."""
    if caching.cache is None:
        if holds_cache(options.data):
            return options
        raise ExamplesError(
            f"{options.data} is no cache; give --cache, where to make one of it, or make it with "
            "`raymem ingest`"
        )
    cache = absolute_store(caching.cache, "--cache")
    if make:
        summary = ingest(
            absolute_store(options.data, "--data"),
            cache,
            size=caching.size,
            on_bad=caching.on_bad,
            val_labels=caching.val_labels,
            engine=machine.engine,
            verbose=machine.verbose,
        )
        click.echo(ingest_text(summary))
    return dataclasses.replace(options, data=cache)
