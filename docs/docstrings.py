"""Docstrings as Markdown: doctests become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(>>> .*\n?)((?:\S.*\n?)*)", re.MULTILINE)


def with_fences(text: str) -> str:
    """The text with each doctest, up to the next empty line, in a block of code.

    >>> with_fences("One more.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['One more.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text).rstrip()


class Doctests(griffe.Extension):
    """Puts the doctests of every docstring into blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for everything it has read."""
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)
