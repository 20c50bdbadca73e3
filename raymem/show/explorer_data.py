"""What the explorer shows, as arrays in one order of examples, and as compact bytes for a browser.

In:  a scored store. Out: `ExplorerTables`, which reads a column, the pairs or the outcomes of an
epsilon when it is asked; `packed`, one array as bytes.

Positions: training examples by index, then test examples by index. P positions, T trials.
"""

from __future__ import annotations

import functools
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymem.encoding import epsilon_name
from raymem.errors import StoreError
from raymem.show.score_tables import column_of
from raymem.store import Store, TrialKey, read_ahead
from raymem.store.trials import decode

SCORES = "scores/examples.parquet"
BASE = ("example_id", "index", "split", "label", "epsilon", "near_duplicate_group")
# Outcomes of so many trials are shown: more do not fit the width of a screen.
MOST_TRIALS = 512
# Of the 24 bits of a float32's significand the first 13 are kept: four digits, and bytes of zeros.
DROPPED_BITS = 11
NOT_MEASURES = {
    "example_id", "index", "split", "label", "epsilon", "duplicate_group", "near_duplicate_group",
    "delta", "spent_epsilon", "n_targets_in", "n_targets_out",
}  # fmt: skip
ENDS = ("_stderr", "_low", "_high", "_stdev")
# The order of the menus, and of what a page of limited size keeps; others follow.
FIRST = (
    "memorization", "curvature_out", "loss_out", "accuracy_out", "accuracy_in", "learning_epoch",
    "memorization_soft", "curvature_in", "vulnerability", "forgetting_count", "cumulative_loss",
    "curvature_paper_out", "gradient_norm_out", "n_in", "n_out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column that a menu offers."""

    name: str
    """The column."""
    label: str
    """Its plain name with its unit."""
    meaning: str
    """The column's own words."""
    around: tuple[str, ...] = ()
    """The columns of its interval: (low, high), or (stderr,), or none."""


def measures(schema: pa.Schema) -> list[Measure]:
    """The measures of a score table's schema, in the order of the menus."""
    names = [
        f.name
        for f in schema
        if f.name not in NOT_MEASURES
        and not f.name.endswith(ENDS)
        and (pa.types.is_floating(f.type) or pa.types.is_integer(f.type) or f.type == pa.bool_())
    ]
    rank = {name: place for place, name in enumerate(FIRST)}
    names.sort(key=lambda name: rank.get(name, len(FIRST)))
    return [_measure(schema, name) for name in names]


def _measure(schema: pa.Schema, name: str) -> Measure:
    said = schema.field(name).metadata or {}
    around: tuple[str, ...] = ()
    if f"{name}_low" in schema.names:
        around = (f"{name}_low", f"{name}_high")
    elif f"{name}_stderr" in schema.names:
        around = (f"{name}_stderr",)
    meaning = said.get(b"meaning", b"").decode()
    return Measure(name=name, label=column_of(name).heading, meaning=meaning, around=around)


class ExplorerTables:
    """The tables of one scored store by position; each is read when it is first asked for.

    Raises StoreError without scores.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.study = store.study()
        if not store.files.exists(SCORES):
            store.scores()  # says what to run
        # Compressed, and a column is decoded when it is asked for: a large store has gigabytes.
        self._file = store.files.read(SCORES)
        schema = pq.read_schema(pa.BufferReader(self._file))
        self._known = known_columns(self._file)
        self.measures = [m for m in measures(schema) if m.name in self._known]
        self._place_examples(decode(self._file, SCORES, [n for n in BASE if n in schema.names]))
        self._add_membership()

    def _place_examples(self, base: pa.Table) -> None:
        epsilon = np.array(base["epsilon"])
        train = np.array(pc.equal(base["split"], "train"), bool)
        index = np.array(base["index"], np.int64)
        first = np.unique(np.stack([~train, index]), axis=1, return_index=True)[1]
        self.epsilons: list[float] = sorted(set(epsilon.tolist()), reverse=True)
        self.n_train = int(train[first].sum())
        self.index = index[first]
        self.ids: list[str] = base["example_id"].take(pa.array(first)).to_pylist()
        self.labels = _ints(base, "label")[first]
        self.groups = _ints(base, "near_duplicate_group")[first]
        place = np.where(train, self.positions("train", index), self.positions("test", index))
        self._rows = {e: np.flatnonzero(epsilon == e) for e in self.epsilons}
        self._places = {e: place[rows] for e, rows in self._rows.items()}

    def _add_membership(self) -> None:
        """Vulnerability stands beside the scores, if `raymem membership` was run."""
        self._membership: pa.Table | None = None
        try:
            self._membership = self.store.scores("membership")
        except StoreError:
            return
        found = measures(self._membership.schema)
        self.measures += [m for m in found if m.name in ("vulnerability", "attack_auc")]

    @property
    def shown(self) -> float:
        """The epsilon shown first: not private if there is one, or the largest."""
        return float(self.epsilons[0])

    @property
    def n_examples(self) -> int:
        """P."""
        return len(self.ids)

    def positions(self, split: str, index: NDArray[np.int64]) -> NDArray[np.int32]:
        """Positions of examples by split and index; -1 for those that are not here."""
        start, stop = (0, self.n_train) if split == "train" else (self.n_train, self.n_examples)
        own = self.index[start:stop]
        place = np.searchsorted(own, index)
        found = place < len(own)
        found[found] = own[place[found]] == index[found]
        return np.where(found, place + start, -1).astype(np.int32)

    def column(self, epsilon: float, name: str) -> NDArray[np.float32] | None:
        """A measure at an epsilon, float32 [P], null is NaN; None if there is none."""
        values = np.full(self.n_examples, np.nan, np.float32)
        if name in self._known:
            values[self._places[epsilon]] = self._of_all_epsilons(name)[self._rows[epsilon]]
        elif self._membership is not None and name in self._membership.column_names:
            here = self._membership.filter(pc.equal(self._membership["epsilon"], epsilon))
            place = self.positions("train", np.array(here["index"], np.int64))
            values[place[place >= 0]] = _floats(here[name])[place >= 0]
        return None if np.isnan(values).all() else values

    @functools.lru_cache(maxsize=64)  # noqa: B019  one object lives as long as its server
    def _of_all_epsilons(self, name: str) -> NDArray[np.float32]:
        return _floats(decode(self._file, SCORES, [name])[name])

    @functools.cached_property
    def _influence(self) -> pa.Table | None:
        try:
            return self.store.scores("influence")
        except StoreError:
            return None

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def pairs(self, epsilon: float) -> dict[str, np.ndarray]:
        """Relations: `train` and `test` positions, `influence`; the most influential first."""
        empty = {
            "train": np.empty(0, np.int32), "test": np.empty(0, np.int32),
            "influence": np.empty(0, np.float32),
        }  # fmt: skip
        if self._influence is None:
            return empty
        here = self._influence.filter(pc.equal(self._influence["epsilon"], epsilon))
        influence = np.array(here["influence"], np.float32)
        order = np.argsort(-influence, kind="stable")
        found = {
            split: self.positions(split, np.array(here[f"{split}_index"]))[order]
            for split in ("train", "test")
        }
        known = (found["train"] >= 0) & (found["test"] >= 0)
        return {**{k: v[known] for k, v in found.items()}, "influence": influence[order][known]}

    @functools.cached_property
    def _trials(self) -> dict[float, list[TrialKey]]:
        try:
            done = self.store.done()
            return {e: [k for k in self.store.scored(e) if k in done] for e in self.epsilons}
        except StoreError:  # published scores have no trials
            return {e: [] for e in self.epsilons}

    def n_trials(self, epsilon: float) -> int:
        """How many trials were scored."""
        return len(self._trials[epsilon])

    def trials(self, epsilon: float) -> list[TrialKey]:
        """The trials whose outcomes are shown: the first of those that were scored."""
        return self._trials[epsilon][:MOST_TRIALS]

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def outcomes(self, epsilon: float) -> NDArray[np.uint8]:
        """What each trial made of each example: bit 0 trained on it, bit 1 right; uint8 [T, P].

        Reads the trials. Memory is a byte for each of T P outcomes.
        """
        keys = self.trials(epsilon)
        found = np.zeros((len(keys), self.n_examples), np.uint8)

        def read(key: TrialKey) -> pa.Table:
            return self.store.trial(key, ["in_subset", "correct"])

        at_train, at_test = np.split(self.index, [self.n_train])
        for row, (_, table) in enumerate(read_ahead(keys, read)):
            inside = np.array(pc.fill_null(table["in_subset"], False), np.uint8)
            right = np.array(table["correct"], np.uint8)
            both = inside | right << 1
            n_train = table.num_rows - table["in_subset"].null_count
            found[row] = np.concatenate([both[:n_train][at_train], both[n_train:][at_test]])
        return found

    def about(self) -> dict[str, object]:
        """What a page must know before it asks for anything, as JSON-ready data."""
        return {
            "name": self.study.data_name,
            "classes": [str(c) for c in self.study.classes],
            "n": self.n_examples,
            "n_train": self.n_train,
            "epsilons": [epsilon_name(e) for e in self.epsilons],
            "measures": [
                {"name": m.name, "label": m.label, "meaning": m.meaning, "around": m.around}
                for m in self.measures
            ],
        }


def known_columns(file: bytes) -> set[str]:
    """The columns of a Parquet file that are not null everywhere, by its statistics."""
    metadata = pq.ParquetFile(pa.BufferReader(file)).metadata
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    chunks = [group.column(c) for group in groups for c in range(group.num_columns)]
    return {
        chunk.path_in_schema
        for chunk in chunks
        if chunk.statistics is None or chunk.statistics.null_count < chunk.num_values
    }


def _ints(table: pa.Table, name: str) -> NDArray[np.int32]:
    """Null, and what no column has, is -1."""
    if name not in table.column_names:
        return np.full(table.num_rows, -1, np.int32)
    filled = pc.fill_null(table[name].cast(pa.int64()), -1)
    return np.asarray(filled.to_numpy(), np.int32)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Null is NaN, false 0, true 1."""
    return np.array(column.cast(pa.float64()), np.float64).astype(np.float32)


def packed(values: np.ndarray) -> bytes:
    """An array as a browser unpacks it: gzip over its bytes, first all first bytes, and so on.

    Floats are rounded to float32 with four digits; little endian. NaN stays NaN.

    >>> import gzip
    >>> gzip.decompress(packed(np.array([1, 258], np.int32))).hex(" ")
    '01 02 00 01 00 00 00 00'
    """
    if values.dtype.kind == "f":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        half = np.uint32(1 << (DROPPED_BITS - 1))
        values = (bits + half) & ~np.uint32((1 << DROPPED_BITS) - 1)
    else:
        values = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"))
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    return gzip.compress(planes.tobytes(), 6, mtime=0)


def packed_text(text: str) -> bytes:
    """Text as the browser unpacks it."""
    return gzip.compress(text.encode(), 6, mtime=0)


def spread(rows: Sequence[int] | np.ndarray, n: int) -> NDArray[np.int64]:
    """At most n of these rows, evenly spread, in their order.

    >>> spread([3, 4, 5, 6, 7], 2).tolist()
    [3, 7]
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) <= n:
        return rows
    return rows[np.unique(np.linspace(0, len(rows) - 1, max(n, 0)).round().astype(np.int64))]


def thinned(memorization: NDArray[np.float32] | None, n: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of n positions: half the most memorized, the rest evenly spread.

    All positions where they fit. Rising.
    """
    if n <= limit:
        return np.arange(n)
    first = np.empty(0, np.int64)
    if memorization is not None:
        ranked = np.argsort(-np.nan_to_num(memorization, nan=-math.inf), kind="stable")
        first = ranked[: limit // 2]
    rest = np.setdiff1d(np.arange(n), first)
    return np.sort(np.concatenate([first, spread(rest, limit - len(first))]))
