"""What a command line must know of a setting beyond its field's type, default and sentence.

A setting is a field of a frozen dataclass with a sentence under it. `raymem.cli.options` makes an
option of each; a `Setting` in the field's type says what the type does not:

    trials: Annotated[int, Setting(least=1)] = 400
    \"\"\"How many models are trained.\"\"\"
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a field is given on a command line."""

    option: str | None = None
    """The option's name, if it is not the field's; "" for fields that are no option."""
    least: float = -math.inf
    """Smallest value."""
    most: float = math.inf
    """Largest value."""
    above_least: bool = False
    """`least` itself is refused."""
    choices: tuple[str, ...] = ()
    """What the command line offers, if it is not all of a Literal."""
    parse: Callable[[str], Any] | None = None
    """Makes a value of the option's text. Raises ValueError, whose message is shown."""
    form: str = ""
    """What stands for the value in help, such as K/N."""
    none: str | None = None
    """The text that means None, such as "auto"."""
    unit: float = 1.0
    """The option's unit, in the field's: 60 for minutes of a field in seconds."""
    repeated: bool = False
    """A tuple whose items are given one by one, by repeating the option."""
    required: bool = False
    """Must be given."""
    path: bool = False
    """A folder or URL: made absolute, and refused in a submitted job if it is relative."""
    prefix: str = ""
    """Of the options of a nested dataclass."""
    switch: bool = False
    """A nested dataclass that may be None is turned on and off by --NAME/--no-NAME."""
