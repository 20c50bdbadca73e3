"""Choosing rows of a score table: conditions, order, how many."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import RaymemError

OPERATORS = {
    "==": pc.equal, "=": pc.equal, "!=": pc.not_equal,
    "<=": pc.less_equal, ">=": pc.greater_equal, "<": pc.less, ">": pc.greater,
}  # fmt: skip
# Not inside quotes: ids may have the word in them.
AND = re.compile(r"""\s+and\s+(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""", re.IGNORECASE)
LOOSE = re.compile(r"\s(and|or)(\s|$)", re.IGNORECASE)
CONDITION = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|=|<|>)\s*(.+?)\s*")


class TableError(RaymemError, ValueError):
    """Rows were asked for that cannot be chosen."""


def where(table: pa.Table, conditions: str) -> pa.Table:
    """Rows that meet all conditions: "label == 3 and memorization > 0.25". Nulls meet none.

    >>> where(pa.table({"label": [3, 4], "x": [0.1, None]}), "label=3 and x<0.5").num_rows
    1
    """
    for condition in AND.split(conditions.strip()):
        match = CONDITION.fullmatch(condition)
        if match is None:
            raise TableError(
                f"{condition!r} is no condition; write COLUMN OPERATOR VALUE, joined by 'and', "
                "with one of == != < <= > >="
            )
        name, operator, text = match.groups()
        if LOOSE.search(text) and text[0] not in "'\"":
            raise TableError(
                f"{text!r} is no value; conditions are joined by 'and', there is no 'or'; put "
                "quotes around a value that has such a word"
            )
        column = _column(table, name)
        try:
            value = pa.scalar(text.strip("'\"")).cast(column.type)
        except pa.ArrowException as error:
            raise TableError(f"{text} is no value of {name}, which is {column.type}") from error
        table = table.filter(OPERATORS[operator](column, value))
    return table


def top(table: pa.Table, by: str, n: int | None, *, ascending: bool = False) -> pa.Table:
    """The n rows with the largest `by` (smallest if `ascending`), nulls last; all if n is None.

    Ties keep the set's order.
    """
    column = _column(table, by)
    order = "ascending" if ascending else "descending"
    indices = pc.sort_indices(
        pa.table({"by": column, "row": pa.array(range(table.num_rows))}),
        sort_keys=[("by", order), ("row", "ascending")],
    )
    return table.take(indices if n is None else indices[:n])


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise TableError(f"there is no column {name}; take one of {', '.join(table.column_names)}")
    return table[name]
