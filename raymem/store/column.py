"""What a column is: its type, and what a person must know to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """A column's Arrow type, and what a person must know to use it."""

    type: pa.DataType
    meaning: str
    unit: str = ""

    def field(self, name: str) -> pa.Field:
        """The Arrow field, with meaning and unit in its metadata."""
        return pa.field(name, self.type, metadata={"meaning": self.meaning, "unit": self.unit})


Columns = Mapping[str, Column]


def schema(columns: Columns, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """The Arrow schema of a table with these columns."""
    return pa.schema(
        [column.field(name) for name, column in columns.items()],
        metadata=None if metadata is None else dict(metadata),
    )
