"""Tables and sentences for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from raymem.scoring import EpsilonSummary


def for_people(table: pa.Table, *more: str) -> pa.Table:
    """Rows of scores/examples.parquet as people read them; `more` columns at the end."""
    rows = table.to_pylist()
    shown = {
        "example_id": table["example_id"],
        "label": table["label"],
        "in/out": [f"{row['n_in'] or 0}/{row['n_out']}" for row in rows],
        "accuracy in, out": [
            f"{_cell(row['accuracy_in'])}, {_cell(row['accuracy_out'])}" for row in rows
        ],
        "memorization": table["memorization"],
        "95% interval": [
            ""
            if row["memorization"] is None
            else f"[{row['memorization_low']:.3f}, {row['memorization_high']:.3f}]"
            for row in rows
        ],
        "soft": table["memorization_soft"],
    }
    same = ("example_id", "label", "memorization", "memorization_soft")
    if len(set(table["epsilon"].to_pylist())) > 1:
        more = ("epsilon", *more)
    return pa.table({**shown, **{name: table[name] for name in more if name not in same}})


def as_text(table: pa.Table) -> str:
    """The table, aligned; numbers right, nulls empty.

    >>> print(as_text(pa.table({"id": ["a", "b"], "x": [0.5, None]})))
    id      x
    a   0.500
    b
    """
    rows = [list(table.column_names)]
    rows += [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [pa.types.is_string(field.type) for field in table.schema]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def summary_text(summaries: Sequence[EpsilonSummary]) -> str:
    """What the trials at each epsilon say together, a few lines each."""
    lines = []
    for s in summaries:
        at = "" if math.isinf(s.epsilon) else f"epsilon {s.epsilon:g}: "
        if s.trials == 0:
            lines.append(f"{at}no trial is done yet")
            continue
        lines.append(
            f"{at}{s.trials:,} trials; mean accuracy: {_percent(s.accuracy_in)} on examples they "
            f"trained on, {_percent(s.accuracy_out)} on held-out training examples, "
            f"{_percent(s.accuracy_test)} on the test set"
        )
        lines.append(_reliability(s))
        lines += [f"no memorization for {n:,} examples: {why}" for why, n in s.null.items()]
    return "\n".join(lines)


def _reliability(s: EpsilonSummary) -> str:
    if math.isnan(s.reliability):
        return "reliability: needs two blocks of trials, and examples that differ"
    text = (
        f"reliability of memorization: {s.reliability:.3f} (soft: {s.reliability_soft:.3f}), "
        f"expected correlation with the truth {math.sqrt(max(s.reliability, 0)):.3f}"
    )
    forecast = ", ".join(
        f"{target} at {math.ceil(trials):,}"
        for target, trials in s.forecast.items()
        if trials > s.trials
    )
    return f"{text}; forecast trials: {forecast}" if forecast else text


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return str(dict(value))
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else str(value)
