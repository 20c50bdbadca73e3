"""Gathers rows of scores until their shard is complete, and sums up what a run did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymem.curvature.streaming.scorer import LAST, Task
from raymem.curvature.streaming.scoring_model import ScoringModel
from raymem.data.shards.records import Shard
from raymem.data.shards.transform import Batch
from raymem.errors import ExamplesError
from raymem.fleet import StageProgress
from raymem.store import Store, columns


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """An image that was not scored."""

    shard: str
    example_id: str
    error: str


@dataclass(kw_only=True)
class StreamSummary:
    """What one run did with one model."""

    model: str
    shards: int
    """Shards of the set."""
    done_before: int
    """Shards that were in the store already."""
    scored: int = 0
    """Images scored by this run."""
    bad: list[BadImage] = dataclasses.field(default_factory=list)
    """Images that could not be scored."""
    repeated: list[str] = dataclasses.field(default_factory=list)
    """Shards with repeated ids."""
    seconds: float = 0.0
    """Wall time, including the start of workers."""
    mode: str = ""
    """How the trace was computed."""


class Gathered:
    """Rows of unfinished shards; writes each shard when it is complete."""

    def __init__(
        self,
        store: Store,
        model: ScoringModel,
        task: Task,
        about: Mapping[str, Any],
        summary: StreamSummary,
        skip_bad: bool,
    ) -> None:
        self.store, self.model, self.task, self.about = store, model, task, about
        self.summary, self.skip_bad = summary, skip_bad
        self.progress = StageProgress(
            what="curvature", unit="shards", total=summary.shards, done_before=summary.done_before
        )
        self._rows: dict[int, dict[int, dict[str, Any]]] = {}
        self._total: dict[int, int] = {}

    def add(self, batch: Batch) -> None:
        """Take rows of any shards, in any order, and write the shards that they complete."""
        names = list(batch)
        touched = set()
        scored, bad = self.summary.scored, len(self.summary.bad)
        for values in zip(*(batch[name].tolist() for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            number = row.pop("shard")
            touched.add(number)
            if row["position"] == LAST:
                self._total[number] = row["label"]
                continue
            if row["error"]:
                self._bad(self.task.shards[number], row)
            else:
                self.summary.scored += 1
            self._rows.setdefault(number, {})[row["position"]] = row
        whole = [n for n in touched if len(self._rows.get(n, ())) == self._total.get(n, -1)]
        for number in whole:
            self._write(number)
        self.progress.add(
            done=len(whole),
            images=self.summary.scored - scored,
            bad=len(self.summary.bad) - bad,
        )
        self.summary.seconds = self.progress.seconds

    def _bad(self, shard: Shard, row: Mapping[str, Any]) -> None:
        if not self.skip_bad:
            raise ExamplesError(
                f"{row['example_id']} in shard {shard.name} cannot be scored ({row['error']}); "
                "repair it, or run again with --on-bad skip, which gives it a row without scores"
            )
        self.summary.bad.append(
            BadImage(shard=shard.name, example_id=row["example_id"], error=row["error"])
        )

    def _write(self, number: int) -> None:
        shard, rows = self.task.shards[number], self._rows.pop(number, {})
        ordered = [rows[position] for position in range(len(rows))]
        of = {
            name: column
            for name, column in columns.STREAMED.items()
            if name != "curvature_paper" or self.task.rule.paper is not None
        }
        cells: dict[str, list[object]] = {name: [] for name in of}
        for row in ordered:
            ok = not row["error"]
            known = {
                **{name: value if ok else None for name, value in row.items()},
                "example_id": row["example_id"],
                "label": row["label"] if row["label"] >= 0 else None,
                "ok": ok,
                "error": row["error"] or None,
                "content_hash": row["content_hash"] or None,
                "mode": self.about["mode"] if ok else None,
            }
            for name in of:
                cells[name].append(known[name])
        if len({row["example_id"] for row in ordered}) < len(ordered):
            self.summary.repeated.append(shard.name)
        schema = columns.schema(of)
        arrays = [pa.array(cells[field.name], field.type, from_pandas=True) for field in schema]
        about = {**self.about, "shard": shard.url}
        self.store.write_streamed(
            self.model.name, shard.name, pa.Table.from_arrays(arrays, schema=schema), about
        )
