"""One table model: a result as titled columns and rows, for the terminal, the page and JSON.

In:  what `result_tables` makes of a result. Out: text, HTML, dictionaries for JSON.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from raymem.encoding import JsonObject

if TYPE_CHECKING:
    import jinja2

GAP = "  "
# What stands for a number that there is not.
NO_WORD = ("", "-")


class Ranged(Protocol):
    """An estimate with an interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, or its standard error; NaN where not known.

    >>> Estimate(0.557, 0.516, 0.595).text(".2f"), Estimate(0.633, stderr=0.0041).text(".3f")
    ('0.56 [0.52, 0.59]', '0.633 +- 0.004')
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    stderr: float = math.nan

    @classmethod
    def of(cls, found: Ranged | None) -> Estimate | None:
        """Of any result that has a value and the ends of an interval."""
        return None if found is None else cls(found.value, found.low, found.high)

    def text(self, digits: str) -> str:
        """As text; empty if it is not known."""
        if math.isnan(self.value):
            return ""
        if not math.isnan(self.low):
            return f"{self.value:{digits}} [{self.low:{digits}}, {self.high:{digits}}]"
        if not math.isnan(self.stderr):
            return f"{self.value:{digits}} +- {self.stderr:.1g}"
        return f"{self.value:{digits}}"


Cell = str | int | float | bool | Estimate | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    key: str
    """Its name in JSON."""
    title: str
    """Its plain name."""
    unit: str = ""
    digits: str = ".3f"
    """Format of its numbers."""

    @property
    def heading(self) -> str:
        """The plain name with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, cell: Cell) -> str:
        """A cell as people read it; empty if it is not known.

        >>> Column(key="n", title="models").text(1200)
        '1,200'
        """
        if isinstance(cell, Estimate):
            return cell.text(self.digits)
        if isinstance(cell, bool):
            return "yes" if cell else ""
        if isinstance(cell, float):
            return "" if math.isnan(cell) else f"{cell:{self.digits}}"
        if isinstance(cell, int):
            return f"{cell:,}"
        return cell or ""


EPSILON = Column(key="epsilon", title="epsilon")


@dataclass(frozen=True, kw_only=True)
class Table(JsonObject):
    """A result as rows; columns in the order of their importance: a narrow terminal has the first.

    >>> columns = [Column(key="id", title="example"), Column(key="x", title="score")]
    >>> print(Table(columns=columns, rows=[["a", 0.5], ["b", None]]).text())
    example  score
    a        0.500
    b
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [column.text(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def is_text(self, place: int) -> bool:
        """Does the column hold words? They start at the left, numbers end at the right."""
        return any(isinstance(row[place], str) and row[place] not in NO_WORD for row in self.rows)

    def text(self, width: int | None = None) -> str:
        """Title, aligned columns, notes. Columns beyond `width` characters are named, not shown."""
        title = folded(f"{self.title}:", width) if self.title else []
        notes = [line for note in self.notes for line in folded(note, width)]
        return "\n".join([*title, *self._lines(width), *notes])

    def _lines(self, width: int | None) -> list[str]:
        grid = [[column.heading for column in self.columns], *self.cells]
        widths = [max(len(row[k]) for row in grid) for k in range(len(self.columns))]
        fitting = len(widths)
        while width is not None and fitting > 2 and _total(widths[:fitting]) > width:
            fitting -= 1
        lines = [
            GAP.join(
                cell.ljust(widths[k]) if self.is_text(k) or not self.rows else cell.rjust(widths[k])
                for k, cell in enumerate(row[:fitting])
            ).rstrip()
            for row in grid
        ]
        if fitting < len(widths):
            left_out = "; ".join(column.title for column in self.columns[fitting:])
            lines += folded(f"(not shown, the terminal is too narrow: {left_out})", width)
        return lines

    def _repr_html_(self) -> str:
        """As the report has it; notebooks call it."""
        macros = environment().get_template("macros.html").module
        return str(macros.table(self))  # type: ignore[attr-defined]

    def json_fields(self) -> Mapping[str, object]:
        """Columns with keys, plain names and units, rows as lists; an estimate is its value with
        the ends of its interval."""
        return {**vars(self), "columns": [
            {"key": column.key, "title": column.title, "unit": column.unit}
            for column in self.columns
        ]}  # fmt: skip


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of pages and tables; they escape all text but `markupsafe.Markup`."""
    import jinja2  # not at import: `raymem scores` answers at once

    return jinja2.Environment(
        loader=jinja2.PackageLoader("raymem.show", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def terminal_width() -> int | None:
    """Columns of the terminal; None if the output goes to a file or a pipe, which has no edge."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def format_table(table: Table | pa.Table) -> str:
    """A table as wide as the terminal allows; Arrow tables under their own column names.

    >>> print(format_table(pa.table({"id": ["a", "b"], "x": [0.5, None]})))
    id      x
    a   0.500
    b
    """
    if isinstance(table, pa.Table):
        table = from_arrow(table)
    return table.text(terminal_width())


def from_arrow(table: pa.Table, titles: Mapping[str, str] | None = None) -> Table:
    """An Arrow table's columns, under `titles` or their own names."""
    titles = titles or {}
    return Table(
        columns=[Column(key=name, title=titles.get(name, name)) for name in table.column_names],
        rows=[[_plain_cell(value) for value in row.values()] for row in table.to_pylist()],
    )


def _plain_cell(value: object) -> Cell:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def folded(text: str, width: int | None, hang: int = 0) -> list[str]:
    """Lines of prose of at most `width` characters, the following ones indented by `hang`.

    >>> folded("a line of prose", 10, hang=2)
    ['a line of', '  prose']
    """
    return [
        part
        for line in text.split("\n")
        for part in (
            textwrap.wrap(
                line, width, subsequent_indent=" " * hang, break_long_words=False,
                break_on_hyphens=False,
            )
            if width is not None and len(line) > width
            else [line]
        )
    ]  # fmt: skip


def fold(text: str) -> str:
    """Text whose long lines, which are prose, are folded at the edge of the terminal."""
    return "\n".join(folded(text, terminal_width()))


def percent(share: float) -> str:
    """A share in percent; - if it is not known."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"
