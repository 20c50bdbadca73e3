"""Options of job files and commands, made of the frozen dataclasses that they fill.

A setting is declared once, as a field of a dataclass with a sentence under it:

    trials: Annotated[int, Setting(least=1)] = 400
    \"\"\"How many models are trained.\"\"\"

Its option --trials, with type, range, choices, default and help, is made of that. What a type
cannot say is in a `Setting` (raymem/settings.py). A field that is a dataclass itself gives its own
fields' options. "; None: ..." at the end of a sentence says what no value means; help shows it as
the default.

    run_command(work, JobSettings(...))   runs work(the settings, with what the command line says)
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import click

from raymem.cli.base import absolute_store, command_errors
from raymem.errors import RaymemError
from raymem.settings import Setting

PLAIN: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}
FORMS = {int: "N", float: "X", str: "TEXT"}
NONE = "; None: "


@dataclass(frozen=True)
class Field:
    """One field of a dataclass, with all that its option needs."""

    name: str
    type: Any
    """Without Annotated and None."""
    setting: Setting
    value: Any
    """The job's default."""
    sentence: str
    heading: str
    """What help groups it under: the first words of the class that declares it, up to a colon or
    full stop."""
    optional: bool
    """May be None."""

    @property
    def nested(self) -> bool:
        """Is it a dataclass, whose fields are the options?"""
        return dataclasses.is_dataclass(self.type) and not self.reads_text

    @property
    def reads_text(self) -> bool:
        """Is a value made of the option's text by a function?"""
        return self.setting.parse is not None or hasattr(self.type, "parse")

    @property
    def offered(self) -> bool:
        """False for settings that the job does not have."""
        return self.setting.option != "" and not (
            self.nested and self.value is None and not self.setting.switch
        )

    def option(self, prefix: str) -> str:
        """The option's name."""
        return self.setting.option or prefix + self.name.replace("_", "-")


@functools.cache
def sentences(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Heading and sentence of each field of a dataclass, those of its bases among them."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        heading = re.split("[.:\n]", inspect.getdoc(base) or base.__name__)[0]
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, below in itertools.pairwise(body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = heading, " ".join(text.split())
    return found


def fields_of(settings: Any) -> Iterator[Field]:
    """The fields of an instance of a dataclass that a command line can give."""
    cls: type[Any] = type(settings)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(settings):
        hint, setting = hints[field.name], Setting()
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            setting = next((note for note in notes if isinstance(note, Setting)), setting)
        kinds = [hint]
        if get_origin(hint) in (typing.Union, types.UnionType):
            kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        heading, sentence = sentences(cls).get(field.name, ("", ""))  # type: ignore[arg-type]
        made = Field(
            name=field.name,
            type=kinds[0],
            setting=setting,
            value=getattr(settings, field.name),
            sentence=sentence,
            heading=setting.heading or heading,
            optional=types.NoneType in get_args(hint),
        )
        if made.offered:
            yield made


class Parsed(click.ParamType[Any]):
    """Text that a function makes a value of, or a text that means None."""

    def __init__(self, parse: Callable[[str], Any], form: str, none: str | None) -> None:
        self.name, self._parse, self._none = form, parse, none

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Raises click.BadParameter, with the function's message, for what it refuses."""
        if not isinstance(value, str):
            return value
        try:
            return None if value == self._none else self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def numbers(kind: type, text: str) -> tuple[Any, ...]:
    """Numbers between commas. Raises ValueError for anything else."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"invalid list {text!r}; give numbers such as 10,20,40") from None


def click_type(field: Field, option: str) -> click.ParamType[Any]:
    """What click reads the option's text with."""
    setting, kind = field.setting, field.type
    form = setting.form or option
    if field.reads_text:
        return Parsed(setting.parse or kind.parse, form, setting.none)
    if get_origin(kind) is Literal:
        return click.Choice(setting.choices or get_args(kind))
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if setting.repeated:
            return PLAIN[item]
        return Parsed(functools.partial(numbers, item), form, setting.none)
    least, most = setting.least, setting.most
    plain: click.ParamType[Any] = PLAIN.get(kind, click.STRING)
    if (least, most) != (-math.inf, math.inf):
        low = None if least == -math.inf else kind(least)
        high = None if most == math.inf else kind(most)
        ranged = click.IntRange if kind is int else click.FloatRange
        plain = ranged(min=low, max=high, min_open=setting.above_least)
    if setting.none is not None:
        return Parsed(functools.partial(_converted, plain), form, setting.none)
    return plain


def _converted(kind: click.ParamType[Any], text: str) -> Any:
    try:
        return kind.convert(text, None, None)
    except click.BadParameter as error:
        raise ValueError(error.message) from None


def as_text(value: Any, none: str | None = None) -> str | None:
    """A default as it would be typed.

    >>> as_text((0.5, 2.0, math.inf)), as_text(None, "auto")
    ('0.5,2,inf', 'auto')
    """
    if value is None:
        return none
    if isinstance(value, tuple):
        return ",".join(str(as_text(item)) for item in value)
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


class SettingOption(click.Option):
    """The option of one field."""

    def __init__(self, field: Field, prefix: str) -> None:
        self.field = field
        name, setting = field.option(prefix), field.setting
        text, _, meaning = field.sentence.rstrip(".").partition(NONE)
        self.meaning_of_none = "" if setting.switch or field.value else meaning
        more: dict[str, Any] = {"default": field.value, "help": f"{text}."}
        declared = f"--{name}"
        if setting.switch or (field.type is bool and (field.value or field.optional)):
            declared = f"--{name}/--no-{name}"
            more["default"] = field.value is not None if setting.switch else field.value
        elif field.type is bool:
            more["is_flag"] = True
        elif setting.repeated:
            more |= {"multiple": True, "type": click_type(field, name)}
        else:
            form = "PATH" if setting.path else FORMS.get(field.type)
            more |= {"type": click_type(field, name), "metavar": setting.form or form}
            if setting.required:
                more |= {"required": True, "default": None}
            elif isinstance(more["type"], Parsed):
                more["default"] = as_text(field.value, setting.none)
            elif field.value is not None and setting.unit != 1:
                more["default"] = field.value / setting.unit
        super().__init__([declared, name.replace("-", "_")], **more)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Default and range; for None what it means."""
        extra = super().get_help_extra(ctx)
        if self.meaning_of_none:
            extra["default"] = self.meaning_of_none
        return extra


def options_of(
    settings: Any, prefix: str = "", *, skip: Collection[str] = ()
) -> list[SettingOption]:
    """The options of an instance, whose values are the defaults; none of the fields in `skip`."""
    made = []
    for field in fields_of(settings):
        if field.name in skip:
            continue
        if not field.nested or field.setting.switch:
            made.append(SettingOption(field, prefix))
        if field.nested:
            inner, setting = field.value or field.type(), field.setting
            made += options_of(inner, setting.prefix, skip=setting.without)
    return made


def filled(
    settings: Any, values: Mapping[str, Any], prefix: str = "", *, skip: Collection[str] = ()
) -> Any:
    """`settings` with the values of their options. Raises what the dataclasses raise."""
    changes: dict[str, Any] = {}
    for field in fields_of(settings):
        option = field.option(prefix)
        key = option.replace("-", "_")
        if field.name in skip:
            continue
        if field.nested:
            on = not field.setting.switch or values[key]
            inner, setting = field.value or field.type(), field.setting
            given = filled(inner, values, setting.prefix, skip=setting.without) if on else None
            changes[field.name] = given
        else:
            changes[field.name] = _given(field.setting, values[key], f"--{option}")
    return dataclasses.replace(settings, **changes)


def _given(setting: Setting, value: Any, option: str) -> Any:
    """The field's value for the option's."""
    if setting.path and value:
        return absolute_store(os.fspath(value), option)
    return value if value is None or setting.unit == 1 else value * setting.unit


def setting_options(settings: Any) -> Callable[[click.Command], click.Command]:
    """A decorator that adds the options of `settings` to a command."""

    def add(command: click.Command) -> click.Command:
        command.params += options_of(settings)
        return command

    return add


def stage_argument(stages: Sequence[str]) -> click.Argument:
    """Which stage of a job runs."""
    return click.Argument(
        ["stage"],
        type=click.Choice(stages),
        default="all",
        help="Stage to run; plan: no stage, only what they would take and tell.  [default: all]",
    )


class SettingsCommand(click.Command):
    """A command whose help shows the options of each dataclass under its heading."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Command.format_options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                heading = param.field.heading if isinstance(param, SettingOption) else "This run"
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def run_command(
    work: Callable[..., None],
    *settings: Any,
    skip: Collection[str] = (),
    params: Sequence[click.Parameter] = (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a job file: `work` gets the settings, with what the command line says, and `params`.

    Help is the docstring of the file that is run. `skip` are fields of the first of `settings` that
    are no options. Exits with 0 when done, 1 on failure, 2 on wrong usage, 3 if another driver
    holds the store, 4 without space.
    """

    def command(debug: bool, **values: Any) -> None:
        with command_errors(debug):
            first, *others = settings
            try:
                given = [filled(first, values, skip=skip)]
                given += [filled(other, values) for other in others]
            except RaymemError:
                raise
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            names = [param.name for param in params]
            work(*given, **{str(name): values[str(name)] for name in names})

    options = options_of(settings[0], skip=skip)
    for other in settings[1:]:
        options += options_of(other)
    made = SettingsCommand(
        sys.argv[0],
        callback=command,
        help=(sys.modules["__main__"].__doc__ or "").replace("\n\n", "\n\n\b\n"),
        params=[
            *params,
            *options,
            click.Option(["--debug"], is_flag=True, help="Show tracebacks."),
        ],
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    made.main(args=None if arguments is None else list(arguments), standalone_mode=True)
