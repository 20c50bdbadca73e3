"""Which examples a report shows: the most memorized, curvature's extremes, label errors, copies.

In:  tables of a scored store at one epsilon. Out: `Chosen`, rows as dictionaries.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from raymem.errors import StoreError
from raymem.links import label_errors
from raymem.links.column_arrays import train_at
from raymem.links.correlation import MEMORIZED
from raymem.store import Store
from raymem.store.columns import Row

# Examples shown per class: fewer of many classes.
PER_CLASS = ((20, 6), (200, 4), (math.inf, 2))
FIRST, SUSPICIOUS, TABLE_ROWS, PAIRS, GROUPS = 12, 24, 1000, 24, 24


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a report shows of the examples at one epsilon."""

    epsilon: float
    classes: list[str]
    table: list[Row]
    """The most memorized training examples, most first."""
    first: list[Row]
    """The most memorized of all above 0.25; `relation` is their best pair, `elsewhere` their
    memorization at other epsilons."""
    gallery: dict[int, list[Row]]
    """The most memorized of each class that has any above 0.25, with the same."""
    lowest: dict[int, list[Row]] = field(default_factory=dict)
    """Of each class, those of least curvature; empty if it was not measured."""
    highest: dict[int, list[Row]] = field(default_factory=dict)
    suspicious: list[Row] = field(default_factory=list)
    """Probable label errors: models that did not see them are sure of another class."""
    pairs: list[Row] = field(default_factory=list)
    """The strongest pairs."""
    copies: list[list[Row]] = field(default_factory=list)
    """Groups of near duplicates, those with different labels first."""

    def ids(self) -> list[str]:
        """Ids of all examples whose pictures are shown."""
        rows = [
            *self.first,
            *(row for group in self.gallery.values() for row in group),
            *(
                row
                for side in (self.lowest, self.highest)
                for rows in side.values()
                for row in rows
            ),
            *self.suspicious,
            *(row for group in self.copies for row in group),
        ]
        found = [row["example_id"] for row in rows]
        found += [row["relation"]["test_id"] for row in rows if row.get("relation")]
        found += [pair[side] for pair in self.pairs for side in ("train_id", "test_id")]
        return list(dict.fromkeys(found))


def choose(store: Store, epsilon: float) -> Chosen:
    """What to show at `epsilon`. Raises StoreError without scores."""
    scores, classes = store.scores(), list(store.study().classes)
    here = train_at(scores, epsilon)
    ranked = here.filter(pc.is_valid(here["memorization"]))
    order = [("memorization", "descending"), ("memorization_soft", "descending")]
    ranked = ranked.take(pc.sort_indices(ranked, order))
    per_class = next(n for most, n in PER_CLASS if len(classes) <= most)
    pairs = _pairs(store, epsilon)
    best: dict[str, Row] = {}
    for pair in pairs:
        best.setdefault(pair["train_id"], pair)
    memorized = ranked.filter(pc.greater(ranked["memorization"], MEMORIZED))
    first = memorized.slice(0, FIRST).to_pylist()
    gallery = _by_class(memorized, per_class)
    shown = [*first, *(row for rows in gallery.values() for row in rows)]
    others = _at_other_epsilons(scores, epsilon, [row["example_id"] for row in shown])
    for row in shown:
        row["relation"] = best.get(row["example_id"])
        row["elsewhere"] = others.get(row["example_id"], {})
    lowest: dict[int, list[Row]] = {}
    highest: dict[int, list[Row]] = {}
    if "curvature_out" in here.column_names:
        measured = here.filter(pc.is_finite(pc.fill_null(here["curvature_out"], math.nan)))
        rising = measured.take(pc.sort_indices(measured, [("curvature_out", "ascending")]))
        few = max(1, per_class // 2)
        lowest = _by_class(rising, few)
        highest = _by_class(rising.take(pa.array(range(rising.num_rows - 1, -1, -1))), few)
    return Chosen(
        epsilon=epsilon,
        classes=classes,
        table=ranked.slice(0, TABLE_ROWS).to_pylist(),
        first=first,
        gallery=gallery,
        lowest=lowest,
        highest=highest,
        suspicious=label_errors(store, epsilon).rows[:SUSPICIOUS],
        pairs=[pair for pair in pairs if pair["strong"]][:PAIRS],
        copies=_copies(store),
    )


def _at_other_epsilons(
    scores: pa.Table, epsilon: float, ids: list[str]
) -> dict[str, dict[float, float]]:
    """Memorization of these examples at each other epsilon, by id."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for other in sorted(set(scores["epsilon"].to_pylist()) - {epsilon}):
        here = train_at(scores, other)
        here = here.filter(pc.is_in(here["example_id"], pa.array(ids, pa.string())))
        for name, value in zip(
            here["example_id"].to_pylist(), here["memorization"].to_pylist(), strict=True
        ):
            if value is not None:
                found[name][other] = value
    return found


def _by_class(table: pa.Table, n: int) -> dict[int, list[Row]]:
    """The first n rows of each class, classes in order."""
    found: dict[int, list[Row]] = defaultdict(list)
    labels = table["label"].to_pylist()
    chosen = []
    for row, label in enumerate(labels):
        if label is not None and len(found[label]) < n:
            found[label].append({"row": row})
            chosen.append(row)
    rows = dict(zip(chosen, table.take(pa.array(chosen, pa.int64())).to_pylist(), strict=True))
    return {k: [rows[r["row"]] for r in found[k]] for k in sorted(found)}


def _pairs(store: Store, epsilon: float) -> list[Row]:
    try:
        table = store.scores("influence")
    except StoreError:
        return []
    table = table.filter(pc.equal(table["epsilon"], epsilon))
    return list(table.take(pc.sort_indices(table, [("influence", "descending")])).to_pylist())


def _copies(store: Store) -> list[list[Row]]:
    index = store.examples()
    rows = index.filter(pc.is_valid(index["near_duplicate_group"])).to_pylist()
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["near_duplicate_group"]].append(row)
    several = [group for group in groups.values() if len(group) > 1]
    several.sort(key=lambda group: (len({row["label"] for row in group}) == 1, -len(group)))
    return [group[:6] for group in several[:GROUPS]]
