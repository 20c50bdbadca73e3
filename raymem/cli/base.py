"""The command `raymem`, errors and paths on command lines, and options of several commands."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from raymem.errors import RaymemError, StoreError
from raymem.version import VERSION


@contextlib.contextmanager
def command_errors(debug: bool) -> Iterator[None]:
    """Errors as one line and an exit code; tracebacks only with `debug`."""
    try:
        yield
    except RaymemError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `raymem scores STORE | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if debug:
            raise
        click.echo(f"error: {error}; check the path and what is there", err=True)
        sys.exit(1)


def debug_option(function: Any) -> Any:
    """--debug."""
    return click.option("--debug", is_flag=True, help="Show tracebacks.")(function)


def row_options(function: Any) -> Any:
    """Which rows of a table are shown, and as what."""
    for option in (
        click.option("--csv", is_flag=True, help="Print all columns as CSV."),
        click.option("--all", "everything", is_flag=True, help="Show all rows."),
        click.option(
            "--top", "n", type=click.IntRange(1), default=20, help="Number of rows to show."
        ),
    ):
        function = option(function)
    return function


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def main() -> None:
    """Read, compare and exchange the results of memorization studies.

    STORE is the folder or URL of a study: what its job was given as --store.
    """


def absolute_store(store: str, option: str = "--store") -> str:
    """The path of an option made absolute, or its URL; relative ones are refused in submitted jobs.

    A submitted job runs in a temporary copy of the working folder, where results would vanish.
    """
    if "://" in store or Path(store).is_absolute():
        return store
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise StoreError(
            f"{option} {store} is relative, and a submitted job runs in a temporary folder; give "
            "an absolute path that all nodes see, or a URL"
        )
    return str(Path(store).expanduser().absolute())
