"""The command `raymem`, its errors, and options that several of its commands have."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from raymem.errors import RaymemError
from raymem.version import VERSION

SHOWN_PROBLEMS = 20
SCORES = ("fz-scores", "c-scores")


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
        click.option("--csv", is_flag=True, help="All columns as CSV."),
        click.option("--all", "everything", is_flag=True, help="All rows."),
        click.option("--top", "n", type=click.IntRange(1), default=20, help="How many rows."),
    ):
        function = option(function)
    return function


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def main() -> None:
    """Read what a fleet of models memorized.

    A store is the folder or URL that a job was given as --store.
    """
