"""Options are the fields of dataclasses: nothing is declared twice, and nothing is left out."""

from __future__ import annotations

import dataclasses
import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from raymem import CurvatureRule, JobSettings, PrivateStudy, Recipe
from raymem.cli import Smoke, job_curvature, job_experiments, job_study
from raymem.cli.job_settings import CacheSettings, PoolSettings, RunOptions
from raymem.cli.options import as_text, fields_of, options_of, run_command
from raymem.curvature import PaperRule
from raymem.data.load import NAMED
from raymem.fleet import Resources
from raymem.settings import Setting

JOBS = Path(__file__).parents[1] / "jobs"


@dataclass(frozen=True, kw_only=True)
class Paint:
    """Paint: what is on the wall."""

    colour: Literal["red", "blue"] = "red"
    """The colour."""
    coats: Annotated[int, Setting(least=1, most=9)] = 2
    """How many coats; more cover better."""

    def __post_init__(self) -> None:
        if self.colour == "blue" and self.coats == 1:
            raise ValueError("one coat of blue does not cover")


@dataclass(frozen=True, kw_only=True)
class Wall:
    """The wall."""

    width: float = 2.5
    """Width in metres."""
    height: Annotated[float | None, Setting(option="how-high", above_least=True, least=0)] = None
    """Height in metres; None: up to the
    ceiling."""
    drying: Annotated[float, Setting(option="drying-minutes", unit=60)] = 600.0
    """Time to dry."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes of the brushes."""
    names: Annotated[tuple[str, ...], Setting(option="name", repeated=True)] = ()
    """Who paints; can be repeated."""
    helpers: Annotated[int | None, Setting(none="auto", least=1)] = None
    """How many help."""
    outside: bool = False
    """It is outside."""
    dry: bool = True
    """It is dry."""
    paint: Annotated[Paint | None, Setting(switch=True, prefix="paint-")] = None
    """Paint it; None: it stays bare."""
    secret: Annotated[int, Setting(option="")] = 3


def given(*arguments, wall=Wall()):
    """The settings that a command got."""
    seen = []
    with pytest.raises(SystemExit) as end:
        run_command(seen.append, wall, arguments=arguments)
    return seen[0] if seen else end.value.code


def test_without_options_settings_are_the_jobs_own():
    for wall in (Wall(), Wall(width=1 / 3, paint=Paint(coats=3), helpers=4, dry=False)):
        assert given(wall=wall) == wall


def test_each_option_fills_its_field():
    assert given("--width", "3", "--how-high", "1e-3") == Wall(width=3, height=0.001)
    assert given("--drying-minutes", "2") == Wall(drying=120.0)
    assert given("--sizes", "7,8,9") == Wall(sizes=(7, 8, 9))
    assert given("--name", "a", "--name", "b") == Wall(names=("a", "b"))
    assert given("--helpers", "2") == Wall(helpers=2)
    assert given("--helpers", "auto", wall=Wall(helpers=5)) == Wall()
    assert given("--outside", "--no-dry") == Wall(outside=True, dry=False)
    assert given("--paint") == Wall(paint=Paint())
    assert given("--paint", "--paint-colour", "blue") == Wall(paint=Paint(colour="blue"))
    # Without the switch nested settings change nothing; with --no- a default is taken away.
    assert given("--paint-coats", "3") == Wall()
    assert given("--no-paint", wall=Wall(paint=Paint(coats=4))) == Wall()
    assert given("--paint-coats", "5", wall=Wall(paint=Paint(colour="blue"))).paint == Paint(
        colour="blue", coats=5
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--how-high", "0"], "0.0 is not in the range x>0"),
        (["--helpers", "0"], "0 is not in the range x>=1"),
        (["--helpers", "many"], "'many' is not a valid integer"),
        (["--sizes", "1,b"], "invalid list '1,b'; give numbers such as"),
        (["--paint-colour", "green"], "'green' is not one of 'red', 'blue'"),
        (["--paint", "--paint-colour", "blue", "--paint-coats", "1"], "one coat of blue does not"),
        (["--secret", "4"], "No such option '--secret'"),
    ],
)
def test_what_is_refused_is_wrong_usage(arguments, says, capsys):
    assert given(*arguments) == 2
    assert says in capsys.readouterr().err


def test_help_is_made_of_the_sentences(capsys):
    assert given("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "The wall: --width X Width in metres. [default: 2.5]",
        "--how-high X Height in metres. [default: up to the ceiling; x>0",
        "--drying-minutes X Time to dry. [default: 10.0]",
        "Sizes of the brushes. [default: 1,2]",
        "How many help. [default: auto]",
        "--dry / --no-dry It is dry. [default: dry]",
        "--paint / --no-paint Paint it. [default: no-paint]",
        "Paint: --paint-colour [red|blue] The colour. [default: red]",
        "How many coats; more cover better. [default: 2; 1<=x<=9]",
    ):
        assert part in text, part


def test_a_new_field_is_a_new_option(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Bigger(JobSettings):
        """A job with one more setting."""

        glasses: Annotated[int, Setting(least=1)] = 2
        """Pairs of glasses for the reader."""

    seen = []
    settings = Bigger(data="digits", store="memory://bigger", trials=20)
    for arguments in (["--glasses", "3"], ["--help"], ["--glasses", "0"]):
        with pytest.raises(SystemExit):
            run_command(seen.append, settings, arguments=arguments)
    assert seen == [dataclasses.replace(settings, glasses=3)]
    out, err = capsys.readouterr()
    assert "Pairs of glasses for the reader." in out
    assert "0 is not in the range x>=1" in err


WHOLE = JobSettings(
    data="digits",
    store="memory://whole",
    trials=20,
    curvature=CurvatureRule(paper=PaperRule()),
    pool=PoolSettings(),
    cache=CacheSettings(),
    private=PrivateStudy(recipe=Recipe(model="mlp-8", epochs=1), trials=2, epsilons=(1.0,)),
)


def nested(settings):
    """An instance and those of its fields that are dataclasses."""
    yield settings
    for each in fields_of(settings):
        if each.nested:
            yield from nested(each.value or each.type())


@pytest.mark.parametrize(
    "settings",
    [
        WHOLE, RunOptions(), Resources(), job_curvature.ScoringSettings(),
        job_experiments.RemovalSettings(data="digits", store="memory://r"),
        job_experiments.LeaveOneOutSettings(data="digits", store="memory://r"),
    ],
)  # fmt: skip
def test_every_setting_has_its_sentence_and_one_option(settings):
    for each in nested(settings):
        for setting in fields_of(each):
            assert setting.sentence.endswith("."), (type(each), setting.name)
            assert setting.heading, type(each)
    names = [option.name for option in options_of(settings, skip=("epsilons", "privacy"))]
    assert len(set(names)) == len(names)


def shown(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.py")), ids=lambda path: path.stem)
def test_every_setting_of_a_job_is_in_its_help(path, monkeypatch, capsys):
    asked = []
    for module in (job_study, job_experiments, job_curvature):
        command = module.run_command

        def seen(work, *settings, command=command, **more):
            asked.append((settings, more))
            command(work, *settings, **more)

        monkeypatch.setattr(module, "run_command", seen)
    text = shown(path, monkeypatch, capsys)
    ((settings, more),) = asked
    for number, each in enumerate(settings):
        skip = more.get("skip", ()) if number == 0 else ()
        for option in options_of(each, skip=skip):
            assert f"{option.opts[0]} " in text.replace("\n", " \n"), option.opts
    assert f"python jobs/{path.name}" in text


def test_the_sentence_on_data_has_all_names():
    (data,) = (each for each in fields_of(WHOLE) if each.name == "data")
    assert all(name in data.sentence for name in NAMED)


def test_smoke_is_offered_where_there_is_a_smoke_recipe(capsys):
    recipe = Recipe(model="mlp-8", epochs=1)
    for smoke in (None, Smoke(recipe=recipe)):
        with pytest.raises(SystemExit):
            job_study.run_job(WHOLE, recipe, smoke=smoke, arguments=["--help"])
        assert ("--smoke" in capsys.readouterr().out) == (smoke is not None)


@pytest.mark.parametrize("value", [0.1, 1 / 3, math.inf, 1e-5, 12345678.5])
def test_defaults_survive_being_text(value):
    assert float(as_text(value)) == value
