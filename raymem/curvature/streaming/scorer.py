"""The work of workers: read and decode a shard in chunks of rows, and score batches of rows.

The same code in this process and in Ray Data's tasks and actors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.scoring_model import ScoringModel
from raymem.data.pixels import content_hash
from raymem.data.shards.records import Shard
from raymem.data.shards.shard_readers import read_shard
from raymem.data.shards.transform import LARGEST_LABEL, Batch, Transform, decode
from raymem.store import columns
from raymem.training import Meter, default_device, fast_arithmetic

# Rows in a chunk.
CHUNK = 64
# The position of the row after a shard's last; its label says how many there were.
LAST = -1


@dataclass(frozen=True, kw_only=True)
class Task:
    """The settings of reading and scoring, sent to every worker."""

    shards: Sequence[Shard]
    transform: Transform
    n_classes: int
    rule: CurvatureRule
    seed: int
    batch_size: int
    threads: int
    channels_last: bool


def read(task: Task, number: int) -> Iterator[Batch]:
    """A shard in chunks of rows, and a last row that says how many there were."""
    rows: list[dict[str, object]] = []
    H, W = task.transform.size
    blank = np.zeros((H, W, 1 if task.transform.grey else 3), np.uint8)

    def row(position: int, **values: object) -> dict[str, object]:
        empty = {"example_id": "", "label": -1, "content_hash": "", "error": "", "pixels": blank}
        return {"shard": number, "position": position, **empty, **values}

    position = 0
    for record in read_shard(task.shards[number]):
        pixels, error = decode(record, task.transform, task.n_classes)
        values: dict[str, object] = {"example_id": record.example_id, "error": error}
        if record.label is not None and 0 <= record.label < LARGEST_LABEL:
            values["label"] = record.label
        if pixels is not None:
            values |= {"pixels": pixels, "content_hash": content_hash(pixels)}
        rows.append(row(position, **values))
        position += 1
        if len(rows) == CHUNK:
            yield _columns(rows)
            rows = []
    rows.append(row(LAST, label=position))
    yield _columns(rows)


def _columns(rows: Sequence[Mapping[str, object]]) -> Batch:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class Scorer:
    """Holds a model on its device; scores batches of decoded images."""

    def __init__(self, task: Task, model: ScoringModel) -> None:
        self.task, self.device = task, default_device()
        self.net = model.net.to(self.device).eval()
        self.meter: Meter | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch without pixels, with a value for each row that could be decoded."""
        good = np.flatnonzero((batch["error"] == "") & (batch["position"] != LAST))
        n, found = len(batch["position"]), {}
        if len(good):
            x = torch.from_numpy(np.ascontiguousarray(batch["pixels"][good])).to(self.device)
            y = torch.from_numpy(batch["label"][good].astype(np.int64)).to(self.device)
            with fast_arithmetic(self.task.threads):
                found = self._score(x, y)
        errors = batch["error"].astype(object)
        for row, finite in zip(good, _finite(found), strict=True):
            if not finite:
                errors[row] = "the model gives values for it that are not finite"
        values = {}
        for name in columns.STREAMED_VALUES:
            if name == "curvature_paper" and self.task.rule.paper is None:
                continue
            values[name] = np.full(n, np.nan, np.float32)
            if name in found:
                values[name][good] = found[name]
        kept = ("shard", "position", "example_id", "label", "content_hash")
        return {**{name: batch[name] for name in kept}, "error": errors.astype(str), **values}

    def _score(self, x: torch.Tensor, y: torch.Tensor) -> Batch:
        task = self.task
        if self.meter is None:
            # Scorers see other images first, and would choose other precisions.
            asked = task.rule.precision
            exact = "float32" if asked == "auto" else asked
            rule = dataclasses.replace(task.rule, precision=exact)
            self.meter = Meter(
                self.net, x, y, rule, seed=task.seed, channels_last=task.channels_last
            )
        return self.meter.all(x, y, task.batch_size)


def _finite(found: Batch) -> NDArray[np.bool_]:
    if not found:
        return np.zeros(0, bool)
    finite: NDArray[np.bool_] = np.logical_and.reduce([np.isfinite(v) for v in found.values()])
    return finite


def read_on_ray(batch: Batch, task: Any) -> Iterator[Batch]:
    import ray

    yield from read(ray.get(task[0]), int(batch["number"][0]))


class RayScorer:
    """A scorer as an actor of Ray Data."""

    def __init__(self, task: Any, model: Any) -> None:
        import ray

        self.scorer = Scorer(ray.get(task[0]), ray.get(model[0]))

    def __call__(self, batch: Batch) -> Batch:
        return self.scorer(batch)
