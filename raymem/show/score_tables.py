"""Rows of score tables as people read them. Imports no scipy: `raymem scores` answers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from raymem.show.table import EPSILON, Cell, Column, Estimate, Table
from raymem.store.columns import Row
from raymem.store.measures import title_of, unit_of


def column_of(name: str, digits: str = ".3f") -> Column:
    """A column of scores/examples.parquet, or a measure, by its plain name and unit.

    >>> column_of("curvature_out").heading
    'curvature, out (nats/pixel^2)'
    """
    return Column(key=name, title=title_of(name), unit=unit_of(name), digits=digits)


def examples_table(table: pa.Table, *more: str) -> Table:
    """Rows of scores/examples.parquet; `more` columns, which were asked for, come early."""
    shown = ("example_id", "label", "memorization", "memorization_soft")
    if len(set(table["epsilon"].to_pylist())) > 1:
        more = ("epsilon", *more)
    more = tuple(name for name in dict.fromkeys(more) if name not in shown)
    columns = [
        Column(key="example_id", title="example"),
        Column(key="label", title="label"),
        Column(key="memorization", title="memorization [95%]"),
        *map(column_of, more),
        Column(key="models", title="models in/out"),
        Column(key="accuracy", title="accuracy in, out"),
        Column(key="memorization_soft", title="soft"),
    ]
    return Table(columns=columns, rows=[_example(row, more) for row in table.to_pylist()])


def _example(row: Row, more: Sequence[str]) -> list[Cell]:
    known = [row["accuracy_in"], row["accuracy_out"]]
    return [
        row["example_id"],
        row["label"],
        memorization_of(row),
        *(row[name] for name in more),
        "" if row["n_out"] is None else f"{row['n_in'] or 0}/{row['n_out']}",
        "" if known == [None, None] else ", ".join("" if v is None else f"{v:.3f}" for v in known),
        row["memorization_soft"],
    ]


def memorization_of(row: Row) -> Estimate | None:
    """An example's memorization with its interval; published scores have none."""
    if row["memorization"] is None:
        return None
    ends = (row["memorization_low"], row["memorization_high"])
    return Estimate(row["memorization"], *(math.nan if end is None else end for end in ends))


def pairs_table(table: pa.Table) -> Table:
    """Rows of scores/influence.parquet."""
    names = {
        "train_id": "training example",
        "train_label": "label",
        "test_id": "test example",
        "test_label": "label",
    }
    columns = [
        *(Column(key=name, title=title) for name, title in names.items()),
        Column(key="influence", title="influence"),
        Column(key="memorization", title="memorization"),
        Column(key="strong", title="strong"),
    ]
    several = len(set(table["epsilon"].to_pylist())) > 1
    if several:
        columns.append(EPSILON)
    rows: list[list[Cell]] = []
    for row in table.to_pylist():
        stderr = row.get("influence_stderr")
        influence = Estimate(row["influence"], stderr=math.nan if stderr is None else stderr)
        last: list[Cell] = [row["epsilon"]] if several else []
        rows.append(
            [*(row[name] for name in names), influence, row["memorization"], row["strong"], *last]
        )
    return Table(columns=columns, rows=rows)
