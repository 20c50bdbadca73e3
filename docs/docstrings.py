"""Docstrings as Markdown: doctests become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(>>> .*\n?)((?:\S.*\n?)*)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
# Shapes such as [R][K], which Markdown would take for a link.
SHAPES = re.compile(r"(?<=\])\[")


def with_fences(text: str) -> str:
    """The text with each doctest, up to the next empty line, in a block of code.

    Shapes outside code are no links.

    >>> with_fences("One more.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['One more.', '', '```pycon', '>>> 1 + 1', '2', '```']
    >>> print(with_fences("Counts, [R][K] each: `x[0][1]`."))
    Counts, [R]\\[K] each: `x[0][1]`.
    """
    fenced = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text).rstrip()
    parts = re.split(f"({CODE.pattern})", fenced, flags=CODE.flags)
    return "".join(p if i % 2 else SHAPES.sub(r"\\\g<0>", p) for i, p in enumerate(parts))


class Doctests(griffe.Extension):
    """Puts the doctests of every docstring into blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for everything it has read."""
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)
