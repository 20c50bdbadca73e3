"""What workers do: read and decode a shard in chunks of rows, and score batches of them.

The same code in this process and in Ray Data's tasks and actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from raymem.curvature import CurvatureRule
from raymem.errors import ExamplesError, first_line
from raymem.examples.pixels import content_hash
from raymem.shards.models import ScoringModel
from raymem.shards.readers import read_shard
from raymem.shards.records import Record, Shard
from raymem.shards.transform import Transform
from raymem.store import columns
from raymem.training import Meter, default_device, fast_arithmetic

# Rows that a reading task hands on at once.
CHUNK = 64
# The position of the row after a shard's last; its label says how many there were.
LAST = -1
# Larger ones are no class numbers, and no table holds the largest.
LARGEST_LABEL = 2**31
Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What reading and scoring need to know, sent to every worker."""

    shards: Sequence[Shard]
    transform: Transform
    n_classes: int
    rule: CurvatureRule
    seed: int
    batch_size: int
    threads: int
    channels_last: bool


def decode(
    record: Record, transform: Transform, n_classes: int
) -> tuple[NDArray[np.uint8] | None, str]:
    """Pixels, or why there are none: never a stand-in. Raises ExamplesError; see `pixels_of`."""
    if record.error:
        return None, record.error
    error = label_error(record.label, n_classes)
    return (None, error) if error else pixels_of(record, transform)


def label_error(label: int | None, n_classes: int) -> str:
    """Why an example with this label is none of a set with so many classes; "" if it is."""
    if label is None:
        return "it has no label"
    return "" if 0 <= label < n_classes else f"label {label} is none of the {n_classes} classes"


def pixels_of(record: Record, transform: Transform) -> tuple[NDArray[np.uint8] | None, str]:
    """A record's pixels, whatever its label, or why there are none.

    Raises ExamplesError if the record is a cache's, of another size than the transform's.
    """
    if record.error:
        return None, record.error
    wanted = (*transform.size, 1 if transform.grey else 3)
    if record.pixels is not None:
        if record.pixels.shape != wanted:
            there, here = ("x".join(map(str, s)) for s in (record.pixels.shape, wanted))
            raise ExamplesError(
                f"the cache's images are {there}, the model wants {here}; take a model of that "
                "size, or ingest the set again with another --size"
            )
        return record.pixels, ""
    if not record.data:
        return None, "its image is empty"
    try:
        return transform(record.data), ""
    except UnidentifiedImageError:
        return None, "no image format that Pillow knows"
    except ExamplesError as error:
        return None, first_line(error)
    except Exception as error:  # Pillow raises many kinds; what matters is which image it is
        return None, f"{type(error).__name__}: {first_line(error)}"


def read(task: Task, number: int) -> Iterator[Batch]:
    """A shard in chunks of rows, and a last row that says how many there were."""
    rows: list[dict[str, Any]] = []
    H, W = task.transform.size
    blank = np.zeros((H, W, 1 if task.transform.grey else 3), np.uint8)

    def row(position: int, **values: Any) -> dict[str, Any]:
        empty = {"example_id": "", "label": -1, "content_hash": "", "error": "", "pixels": blank}
        return {"shard": number, "position": position, **empty, **values}

    position = 0
    for record in read_shard(task.shards[number]):
        pixels, error = decode(record, task.transform, task.n_classes)
        values: dict[str, Any] = {"example_id": record.example_id, "error": error}
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


def _columns(rows: Sequence[Mapping[str, Any]]) -> Batch:
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
            self.meter = Meter(
                self.net, x, y, task.rule, seed=task.seed, channels_last=task.channels_last
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
