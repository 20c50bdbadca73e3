"""Gathers blocks of scores until their shard is complete, and sums up what a run did."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.scorer import Scored, value_columns
from raymem.curvature.streaming.scoring_model import about_key
from raymem.data.shards.records import Shard
from raymem.errors import ExamplesError
from raymem.fleet import StageProgress
from raymem.store import Store, columns

# Objects of a shard that are written at once: an object store takes tens of milliseconds for each.
WRITERS = 8


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
    done_before: int = 0
    """Shards that were in the store already."""
    scored: int = 0
    """Images scored by this run."""
    bad: list[BadImage] = dataclasses.field(default_factory=list)
    """Images that could not be scored."""
    repeated: list[str] = dataclasses.field(default_factory=list)
    """Shards with repeated ids."""
    seconds: float = 0.0
    """Wall time until its last shard, including the start of workers and the other models that
    were scored in the same pass."""
    mode: str = ""
    """How the trace was computed."""


class Gathered:
    """Blocks of unfinished shards; writes a shard's objects, one for each model, when it is
    complete."""

    def __init__(
        self,
        store: Store,
        shards: Sequence[Shard],
        summaries: Sequence[StreamSummary],
        rule: CurvatureRule,
        progress: StageProgress,
        *,
        skip_bad: bool,
    ) -> None:
        """`summaries` of the models, by their numbers, and `progress` are brought up to date."""
        self.store, self.shards, self.rule = store, shards, rule
        self.summaries, self.progress, self.skip_bad = summaries, progress, skip_bad
        self._blocks: dict[int, dict[int, Scored]] = {}
        self._about: dict[int, dict[str, Any]] = {}

    def add(self, block: Scored) -> None:
        """Take a block, in any order, and write its shard if that is complete now."""
        bad = sum(self._count(model, block) for model in block.by_model)
        shard = block.place.shard
        blocks = self._blocks.setdefault(shard, {})
        blocks[block.place.first] = block
        done = 0
        if _complete(blocks.values()):
            ordered = [blocks[first] for first in sorted(blocks)]
            with ThreadPoolExecutor(WRITERS, thread_name_prefix="raymem-write") as pool:
                list(pool.map(lambda model: self._write(model, shard, ordered), block.by_model))
            del self._blocks[shard]
            done = len(block.by_model)
        images = len(block.by_model) * len(block.example_ids) - bad
        self.progress.add(done=done, images=images, bad=bad)
        for model in block.by_model:
            self.summaries[model].seconds = self.progress.seconds

    def _count(self, model: int, block: Scored) -> int:
        """Count a model's images; returns how many are bad."""
        summary, shard = self.summaries[model], self.shards[block.place.shard].name
        wrong = [
            BadImage(shard=shard, example_id=name, error=error)
            for name, error in zip(block.example_ids, block.by_model[model].errors, strict=True)
            if error
        ]
        if wrong and not self.skip_bad:
            raise ExamplesError(
                f"{wrong[0].example_id} in shard {shard} cannot be scored ({wrong[0].error}); "
                "repair it, or run again with --on-bad skip, which gives it a row without scores"
            )
        summary.bad += wrong
        summary.scored += len(block.example_ids) - len(wrong)
        return len(wrong)

    def _write(self, model: int, number: int, blocks: Sequence[Scored]) -> None:
        summary, shard = self.summaries[model], self.shards[number]
        found = [block.by_model[model] for block in blocks]
        ids = [name for block in blocks for name in block.example_ids]
        errors = [error or None for part in found for error in part.errors]
        ok = np.array([error is None for error in errors], bool)
        about = self._about_of(model)
        values = {
            name: np.concatenate([part.values[name] for part in found])
            for name in value_columns(self.rule)
        }
        labels = np.concatenate([block.labels for block in blocks])
        cells: dict[str, Any] = {
            "example_id": ids,
            "label": pa.array(labels, mask=labels < 0),
            "content_hash": [digest or None for block in blocks for digest in block.hashes],
            "ok": ok,
            "error": errors,
            "mode": [about["mode"] if scored else None for scored in ok],
            **{name: pa.array(column, mask=~ok) for name, column in values.items()},
        }
        if len(set(ids)) < len(ids):
            summary.repeated.append(shard.name)
        schema = columns.schema({name: columns.STREAMED[name] for name in cells})
        table = pa.Table.from_pydict(cells, schema=schema)
        self.store.write_streamed(summary.model, shard.name, table, {**about, "shard": shard.url})

    def _about_of(self, model: int) -> Mapping[str, Any]:
        """The record of the model's scores, which its scorer made or checked."""
        if model not in self._about:
            key = about_key(self.summaries[model].model)
            self._about[model] = json.loads(self.store.files.read(key))
            self.summaries[model].mode = self._about[model]["mode"]
        return self._about[model]


def _complete(blocks: Any) -> bool:
    last = next((block for block in blocks if block.place.last), None)
    if last is None:
        return False
    n = sum(len(block.example_ids) for block in blocks)
    return bool(n == last.place.first + len(last.example_ids))
