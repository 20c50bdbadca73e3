"""The reference pages of the site, from the code: commands, settings, errors, the Python API."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import runpy
import sys
import textwrap
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any
from unittest import mock

import click

ROOT = Path(__file__).parents[1]
# Settings of studies, in the order in which one meets them: class, and the file it is in.
SETTINGS = {
    "Recipe": "raymem/training/recipe.py",
    "CurvatureRule": "raymem/curvature/trace.py",
    "PaperRule": "raymem/curvature/paper.py",
    "Privacy": "raymem/privacy/mechanism.py",
    "PairRule": "raymem/scores/influence_pairs.py",
    "Target": "raymem/store/target.py",
    "StudySettings": "raymem/study.py",
    "PrivateStudy": "raymem/cli/job_settings.py",
    "Resources": "raymem/fleet/resources.py",
}
ROOMS = {
    "study": "Studies",
    "cli": "Job files",
    "data": "Examples",
    "plan": "Plans",
    "experiments": "Experiments",
    "training": "Training",
    "fleet": "Fleets",
    "curvature": "Curvature",
    "privacy": "Privacy",
    "scores": "Scores",
    "links": "Links",
    "store": "Stores",
    "show": "Notebooks",
    "interop": "Import and export",
    "errors": "Errors",
}


def command_line() -> str:
    """Every command and job with its options."""
    from raymem.cli import main

    parts = [
        "# Command line\n",
        "Commands read, join and exchange *stores*; *jobs* are Python files that run a study. "
        "`--help` of each says what is on this page. [Exit codes](exit-codes.md) are "
        "the same everywhere; `--debug` shows tracebacks.\n",
        "## Commands\n",
    ]
    for name, command in sorted(main.commands.items()):
        parts.append(_command(f"raymem {name}", command, command.params, level=3))
    jobs = {f"python jobs/{path.name}": job(path) for path in sorted(ROOT.glob("jobs/*.py"))}
    shared = _shared(jobs.values())
    by_job = {
        name
        for name in shared
        if len({_default(p) for c in jobs.values() for p in c.params if p.opts[0] == name}) > 1
    }
    parts.append("## Options of all study jobs\n")
    parts.append("`feldman_*.py` and `privacy_*.py` take these options.\n")
    parts.append(_options(shared.values(), by_job=by_job))
    parts.append("## Jobs\n")
    for name, command in jobs.items():
        own = [p for p in command.params if not _is(p, shared) or not isinstance(p, click.Option)]
        parts.append(_command(name, command, own, level=3))
        values = [
            _default(p) if p.is_flag else f"`{p.opts[0]} {_default(p).strip('`')}`"
            for p in command.params
            if p.opts[0] in by_job and _is(p, shared) and _default(p)
        ]
        if values:
            parts.append(f"Defaults of the options of all study jobs: {', '.join(values)}.\n")
    return "\n".join(parts)


@functools.cache
def job(path: Path) -> click.Command:
    """The command of a job file, which would run it."""
    found: list[click.Command] = []
    with (
        mock.patch.object(click.Command, "main", lambda self, *a, **k: found.append(self)),
        mock.patch.object(sys, "argv", [str(path)]),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return found[0]


def _shared(commands: Iterable[click.Command]) -> dict[str, click.Parameter]:
    """Options that most jobs have with the same meaning, in the order of the longest help."""
    commands = list(commands)
    longest = max(commands, key=lambda command: len(command.params))

    def holders(option: click.Parameter) -> int:
        return sum(_is(option, {p.opts[0]: p for p in c.params}) for c in commands)

    options = [p for p in longest.params if isinstance(p, click.Option)]
    return {p.opts[0]: p for p in options if 2 * holders(p) > len(commands)}


def _is(parameter: click.Parameter, shared: dict[str, click.Parameter]) -> bool:
    same = shared.get(parameter.opts[0])
    return same is not None and getattr(same, "help", "") == getattr(parameter, "help", "")


def _command(name: str, command: click.Command, params: Any, *, level: int) -> str:
    options = [p for p in params if isinstance(p, click.Option)]
    arguments = [_usage(p) for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    text = f"{'#' * level} {name}\n\n```text\n{usage}\n```\n\n{_prose(command.help or '')}\n"
    return f"{text}\n{_options(options)}" if options else text


def _usage(argument: click.Argument) -> str:
    kind = argument.type
    name = "|".join(kind.choices) if isinstance(kind, click.Choice) else argument.name.upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _prose(text: str) -> str:
    """Help as Markdown: its examples and indented commands as code."""
    paragraphs = []
    for paragraph in re.sub("\b\n?", "", inspect.cleandoc(text)).split("\n\n"):
        if paragraph.startswith("    "):
            block = textwrap.dedent(paragraph)
            kind = "console" if block.startswith(("python ", "raymem ", "ray ")) else "text"
            paragraphs.append(f"```{kind}\n{block}\n```")
        elif paragraph.startswith("Example: "):
            joined = " ".join(paragraph.removeprefix("Example: ").split())
            paragraphs.append(f"```console\n$ {joined}\n```")
        else:
            paragraphs.append(paragraph.replace("*", r"\*").replace("<", "&lt;"))
    return "\n\n".join(paragraphs)


def _options(options: Any, *, by_job: Set[str] = frozenset()) -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for option in options:
        if option.opts[0] in ("--debug", "--help", "-h"):
            continue
        names = " / ".join([*option.opts, *option.secondary_opts])
        metavar = "" if option.is_flag else f" {_metavar(option)}"
        default = "by job" if option.opts[0] in by_job else _default(option)
        cells = [f"`{names}{metavar}`", default, _cell(option.help or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _metavar(option: click.Option) -> str:
    kind = option.type
    if isinstance(kind, click.Choice):
        return "/".join(str(choice) for choice in kind.choices)
    names = {"integer range": "N", "integer": "N", "float range": "X", "float": "X"}
    return names.get(kind.name, kind.name.upper())


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    value, meaning = option.default, getattr(option, "meaning_of_none", "")
    if meaning:
        return str(meaning)
    if option.is_flag:
        names = option.opts if value else option.secondary_opts
        return f"`{names[0]}`" if option.secondary_opts else ""
    if value is None or callable(value) or type(value).__name__ == "Sentinel":
        return ""
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def settings() -> str:
    """The fields of the settings' dataclasses: default and meaning."""
    return "\n".join(_fields(name, ROOT / file) for name, file in SETTINGS.items())


def _fields(name: str, path: Path) -> str:
    (tree,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    summary = (ast.get_docstring(tree) or "").split("\n\n")[0]
    lines = [
        f"## {name}\n",
        " ".join(summary.split()) + "\n",
        "| field | default | |",
        "|---|---|---|",
    ]
    for field, text in _documented(tree.body):
        default = "" if field.value is None else f"`{_value(field.value)}`"
        lines.append(f"| `{ast.unparse(field.target)}` | {default} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _value(node: ast.expr) -> str:
    """A default as one would write it: `PaperRule()` of `field(default_factory=PaperRule)`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("field"):
        (made,) = [k.value for k in node.keywords if k.arg in ("default", "default_factory")]
        factory = node.keywords[0].arg == "default_factory"
        return ast.unparse(made) + ("()" if factory else "")
    return ast.unparse(node)


def _documented(body: list[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Fields of a class, each with the string under it."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = str(after.value.value)
            yield node, text


def errors() -> str:
    """The tree of exceptions, as errors.py draws it."""
    drawing = ast.get_docstring(ast.parse((ROOT / "raymem" / "errors.py").read_text())) or ""
    (tree,) = [part for part in drawing.split("\n\n") if "RaymemError" in part]
    return f"```text\n{textwrap.dedent(tree)}\n```"


def public_names() -> dict[str, list[str]]:
    """The names that raymem exports, by the package they come from."""
    body = ast.parse((ROOT / "raymem" / "__init__.py").read_text()).body
    (block,) = [node for node in body if isinstance(node, ast.If)]
    names: dict[str, list[str]] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        room = (node.module or "").split(".")[1]
        names.setdefault(room, []).extend(alias.asname or alias.name for alias in node.names)
    return names


def python() -> str:
    """The page on which mkdocstrings puts every public name's docstring."""
    names = public_names()
    parts = [
        "# Python\n",
        "Everything here is imported from `raymem`. Arrays are numpy's; shapes are in brackets: "
        "T trials, N training examples, M test examples, B images of a batch, K classes.\n",
    ]
    for room in [*ROOMS, *(set(names) - set(ROOMS))]:
        parts.append(f"## {ROOMS.get(room, room)}\n")
        for name in sorted(names.get(room, []), key=str.lower):
            parts.append(f"::: raymem.{name}\n")
            if (ROOT / "raymem" / name).is_dir():  # a package that can be called: its function
                parts.append(f"    options:\n      members: [{name}]\n")
    return "\n".join(parts)
