"""docs/options.md: every option of every job, made of the same fields as the options.

python -m raymem.cli.options_page > docs/options.md
"""

from __future__ import annotations

import math
from typing import Any

import click

from raymem.cli.exchange import IngestOptions
from raymem.cli.job_curvature import ScoringSettings
from raymem.cli.job_removal import RemovalSettings
from raymem.cli.job_settings import (
    CacheSettings,
    JobSettings,
    PoolSettings,
    PrivateStudy,
    RunOptions,
)
from raymem.cli.options import SettingOption, options_of
from raymem.curvature import CurvatureRule
from raymem.fleet import Resources
from raymem.training import Recipe

HEAD = """# Options

Made of the settings' own declarations (`python -m raymem.cli.options_page`). A job file gives its
defaults; `--help` shows them. Settings of the study are recorded in its store, and another value is
another study; how it is run can change from one run to the next.
"""
RECIPE = Recipe(model="mlp-8", epochs=1)
JOB = JobSettings(
    data="digits",
    store="STORE",
    trials=400,
    curvature=CurvatureRule(),
    pool=PoolSettings(),
    cache=CacheSettings(),
)
PRIVATE = PrivateStudy(recipe=RECIPE, trials=40, epsilons=(0.5, 2, 8, math.inf))
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "Jobs that train a fleet": ((JOB, ""), (RunOptions(), "")),
    "Jobs with a private study beside the first": ((PRIVATE, "private-"),),
    "The removal experiment": (
        (RemovalSettings(data="digits", store="STORE"), ""),
        (Resources(), ""),
    ),
    "Curvature of shards under given models": ((ScoringSettings(), ""),),
    "`raymem ingest`": ((IngestOptions(), ""),),
}


def page() -> str:
    """The page as Markdown."""
    lines, shown = [HEAD], set[str]()
    for title, parts in PARTS.items():
        lines.append(f"## {title}\n")
        options = [option for settings, prefix in parts for option in options_of(settings, prefix)]
        for heading in dict.fromkeys(option.field.heading for option in options):
            table = _table([option for option in options if option.field.heading == heading])
            if table in shown:
                lines.append(f"{heading}: as above.\n")
                continue
            shown.add(table)
            lines.append(f"{heading}:\n\n{table}")
    return "\n".join(lines)


def _table(options: list[SettingOption]) -> str:
    rows = ["| option | default | |", "|---|---|---|"]
    for option in options:
        with click.Context(click.Command("job"), show_default=True) as context:
            names = option.get_help_record(context)
            default = option.get_help_extra(context).get("default", "")
        assert names is not None
        name = names[0].replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {option.help} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    click.echo(page(), nl=False)
