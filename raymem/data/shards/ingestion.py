"""A large set -> a cache of decoded pixels, each shard once, with Ray Data or in this process.

A task reads one shard, decodes what can be decoded, writes the pixels, and then, as its commit, one
row per record. What is committed is not decoded again; when all shards are, `finish` judges the
records and makes the cache whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raymem.data.cache import ABOUT, FORMAT, WHOLE
from raymem.data.pixels import content_hash
from raymem.data.shards.finish_cache import IngestSummary, finish, summary_of
from raymem.data.shards.pieces import PieceWriter, shard_key
from raymem.data.shards.ray_data import batches_of, ray_data
from raymem.data.shards.records import Shard
from raymem.data.shards.shard_readers import read_shard
from raymem.data.shards.splits import find_splits
from raymem.data.shards.transform import LARGEST_LABEL, Batch, Transform, pixels_of
from raymem.errors import ExamplesError, FleetError, StoreHeldError, StudyMismatchError
from raymem.fleet import Engine, ProgressLine, Stopped, duration, stop_signals
from raymem.store import DriverLock, Files, columns
from raymem.store.trials import encode
from raymem.version import VERSION

OnBad = Literal["fail", "quarantine"]


@dataclass(frozen=True, kw_only=True)
class DecodeTask:
    """One shard to decode, sent to a worker."""

    cache: str
    """URL of the cache."""
    split: str
    """train or test."""
    shard: Shard
    transform: Transform


def ingest(
    data: str | os.PathLike[str],
    cache: str | os.PathLike[str],
    *,
    size: int = 128,
    grey: bool = False,
    train: str | None = None,
    val: str | None = None,
    val_labels: str | os.PathLike[str] | None = None,
    on_bad: OnBad = "fail",
    engine: Engine = "ray",
    verbose: bool = False,
) -> IngestSummary:
    """Decode the set at `data` (a path or any fsspec URL) into `cache`, size x size pixels.

    Images become the largest centred square, resized, antialiased. `train` and `val` say where the
    splits are, and `val_labels` which classes a flat folder of validation images has, where that
    cannot be found out; see `find_splits` and `read_labels`. Images that cannot be used are an
    error when all shards are decoded, or left out and listed with on_bad="quarantine".

    Raises ExamplesError for sets that cannot be used, StudyMismatchError if `cache` was begun with
    other settings, StoreHeldError if another driver lives, Stopped after Ctrl-C.
    """
    files, data = Files(cache), _absolute(data)
    val_labels = _absolute(val_labels) if val_labels else None
    asked = {
        "format": FORMAT,
        "data": data,
        "size": size,
        "channels": 1 if grey else 3,
        "train": train,
        "val": val,
        "val_labels": val_labels,
    }
    if files.url == data:
        raise ExamplesError(f"{data} cannot be the set and its cache; give another CACHE")
    if files.exists(WHOLE):
        _check(files, asked)
        return summary_of(files)
    splits = find_splits(data, train=train, val=val, val_labels=val_labels, but=files.url)
    transform = Transform(size=(size, size), way="fit", grey=grey)
    settings = {**asked, **splits.facts()}
    text = json.dumps({**settings, "raymem": VERSION}, indent=1)
    files.create(ABOUT, text.encode() + b"\n")
    _check(files, settings)
    tasks = [
        DecodeTask(cache=files.url, split=split, shard=shard, transform=transform)
        for split, shards in (("train", splits.train), ("test", splits.test))
        for shard in shards
    ]
    progress = _Progress(tasks)
    with DriverLock(files, progress=lambda: {"shards_left": progress.left}) as lock:
        _decode_all(files, progress, lock, _on_ray if engine == "ray" else _in_process, verbose)
        summary = finish(files, splits, transform, _name(data), on_bad == "quarantine")
    summary.done_before, summary.images = progress.done_before, progress.images
    summary.seconds = progress.seconds
    return summary


def _absolute(at: str | os.PathLike[str]) -> str:
    url = os.fspath(at)
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())


def _name(data: str) -> str:
    """What people call the set: the last word of its path that says something."""
    path = data.partition("://")[2] or data
    names = [part for part in path.split("/") if part and "*" not in part]
    return names[-1] if names else "set"


def _check(files: Files, settings: Mapping[str, Any]) -> None:
    """Was the cache begun with these settings?"""
    there = json.loads(files.read(ABOUT))
    differences = [
        f"{name}: there {there.get(name)}, here {here}"
        for name, here in settings.items()
        if there.get(name) != here
    ]
    if differences:
        raise StudyMismatchError(
            f"the cache {files.url} was begun otherwise ({'; '.join(differences)}); choose another "
            "CACHE, or go back to those settings"
        )


def _decode_all(
    files: Files,
    progress: _Progress,
    lock: DriverLock,
    run: Callable[[Sequence[DecodeTask], bool], Generator[Mapping[str, int]]],
    verbose: bool,
) -> None:
    missing = progress.skip(set(files.list("shards")))
    if not missing:
        return
    line = ProgressLine()
    with stop_signals() as stops:
        try:
            # Closed at once, whatever happens, so that workers end with the run.
            with contextlib.closing(run(missing, verbose)) as done:
                for counts in done:
                    progress.add(counts)
                    line.show_text(progress.text(), last=progress.left == 0)
                    if lock.lost.is_set():
                        raise StoreHeldError(
                            f"another run took {files.url} over while this one stood still; leave "
                            "it to that one"
                        )
                    if stops.count and progress.left:
                        raise Stopped(
                            f"stopped after {progress.total - progress.left:,} of "
                            f"{progress.total:,} shards; run the same command again to go on"
                        )
        finally:
            line.close()
    lost = progress.skip(set(files.list("shards")))
    if lost:
        raise FleetError(
            f"{len(lost)} shards were decoded, but are not in {files.url}; CACHE must be a folder "
            "that all nodes share, or a URL"
        )


class _Progress:
    """How many shards and images there are, and how fast."""

    def __init__(self, tasks: Sequence[DecodeTask]) -> None:
        self.tasks, self.total = tasks, len(tasks)
        self.done = self.done_before = self.images = self.bad = 0
        self._start = time.monotonic()

    def skip(self, there: set[str]) -> list[DecodeTask]:
        """The tasks whose objects are not `there`."""
        missing = [t for t in self.tasks if shard_key(t.split, t.shard.name) not in there]
        if self.done == 0:
            self.done_before = self.total - len(missing)
        return missing

    @property
    def left(self) -> int:
        """Shards that are not decoded yet."""
        return self.total - self.done_before - self.done

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.monotonic() - self._start

    def add(self, counts: Mapping[str, int]) -> None:
        """A shard is done."""
        self.done += 1
        self.images += counts["images"]
        self.bad += counts["bad"]

    def text(self) -> str:
        """One line: shards, images, rate, time left."""
        parts = [
            f"shards {self.done_before + self.done:,}/{self.total:,}",
            f"{self.images:,} images",
        ]
        if self.bad:
            parts.append(f"{self.bad:,} BAD")
        if self.images:
            parts.append(f"{self.images / self.seconds:,.1f} images/s")
        if self.left:
            parts.append(f"{duration(self.seconds / self.done * self.left)} left")
        return ", ".join(parts)


def decode_shard(task: DecodeTask) -> dict[str, int]:
    """Decode a shard into the cache, and commit it; how many images were decoded and how many not.

    Labels are only recorded: which of them are classes is known when all shards are there.
    """
    files, shard, transform = Files(task.cache), task.shard, task.transform
    shape = (*transform.size, 1 if transform.grey else 3)
    writer = PieceWriter(files, task.split, shard.name, shape)
    of = columns.CACHE_SHARD
    cells: dict[str, list[Any]] = {name: [] for name in of}
    for record in read_shard(shard):
        pixels, error = pixels_of(record, transform)
        label = record.label
        if label is not None and abs(label) >= LARGEST_LABEL:
            label, error = None, error or f"label {label} is no class number"
        row = dict.fromkeys(of) | {"example_id": record.example_id, "label": label}
        row["ok"], row["error"] = not error, error or None
        if pixels is not None and not error:
            row["piece"], row["row"] = writer.add(pixels)
            row["content_hash"] = content_hash(pixels)
        for name in of:
            cells[name].append(row[name])
    writer.flush()
    table = pa.Table.from_pydict(cells, schema=columns.schema(of))
    about = {"shard": shard.url, "split": task.split, "raymem": VERSION}
    files.create(shard_key(task.split, shard.name), encode(table, about))
    good = int(np.sum(cells["ok"]))
    return {"images": good, "bad": len(cells["ok"]) - good}


def _in_process(tasks: Sequence[DecodeTask], verbose: bool) -> Generator[Mapping[str, int]]:
    yield from map(decode_shard, tasks)


def decode_on_ray(batch: Batch) -> Batch:
    counts = decode_shard(pickle.loads(batch["task"][0]))
    return {name: np.array([count]) for name, count in counts.items()}


def _on_ray(tasks: Sequence[DecodeTask], verbose: bool) -> Generator[Mapping[str, int]]:
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import on_cpu_nodes

    with ray_data(verbose=verbose) as ray:
        rows = ray.data.from_items(
            [{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
        )
        done = rows.map_batches(decode_on_ray, batch_size=1, num_cpus=1, **on_cpu_nodes())
        for batch in batches_of(ray, done, "decoding"):
            for images, bad in zip(batch["images"], batch["bad"], strict=True):
                yield {"images": int(images), "bad": int(bad)}
