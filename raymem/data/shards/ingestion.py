"""A large set -> a cache of decoded pixels, each shard once, with Ray Data or in this process.

A task reads one shard, decodes what can be decoded, writes the pixels, and then, as its commit, one
row per record. What is committed is not decoded again; when all shards are, `finish` judges the
records and makes the cache whole.
"""

from __future__ import annotations

import json
import os
import pickle
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
from raymem.data.shards.records import FOLDER_FILES, Shard
from raymem.data.shards.shard_readers import read_shard
from raymem.data.shards.splits import find_splits
from raymem.data.shards.transform import LARGEST_LABEL, Batch, Transform, pixels_of
from raymem.errors import ExamplesError, FleetError, StudyMismatchError
from raymem.fleet import Engine, LongStage, StageProgress
from raymem.store import DriverLock, Files, columns
from raymem.store.trials import encode
from raymem.version import VERSION

OnBad = Literal["fail", "quarantine"]
Counts = dict[str, int]
# Tasks of Ray that a set of many small folders is cut into, so that every CPU has some.
LEAST_TASKS = 64


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
    cannot be detected; see `find_splits` and `read_labels`. Images that cannot be used are an
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
    progress = StageProgress(what="decoding", unit="shards", total=len(tasks))
    status = {"stage": "ingest"}
    with DriverLock(files, progress=lambda: {**status, "left": progress.left}) as lock:
        run = _on_ray if engine == "ray" else _in_process
        _decode_all(files, tasks, progress, lock, run, verbose)
        summary = finish(files, splits, transform, _name(data), on_bad == "quarantine")
    summary.done_before, summary.images = progress.done_before, progress.images
    summary.seconds = progress.seconds
    return summary


def _absolute(at: str | os.PathLike[str]) -> str:
    url = os.fspath(at)
    return url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())


def _name(data: str) -> str:
    """Name of the set: the last part of its path that is not a pattern."""
    path = data.partition("://")[2] or data
    names = [part for part in path.split("/") if part and "*" not in part]
    return names[-1] if names else "set"


def _check(files: Files, settings: Mapping[str, object]) -> None:
    """Raises StudyMismatchError if the cache was begun with other settings."""
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
    tasks: Sequence[DecodeTask],
    progress: StageProgress,
    lock: DriverLock,
    run: Callable[[Sequence[DecodeTask], bool], Generator[Counts]],
    verbose: bool,
) -> None:
    missing = _missing(tasks, files)
    progress.done_before = len(tasks) - len(missing)
    if not missing:
        return
    with LongStage(lock) as stage:
        stage.collect(run(missing, verbose), lambda n: progress.add(done=1, **n), progress)
    lost = _missing(tasks, files)
    if lost:
        raise FleetError(
            f"{len(lost)} shards were decoded, but are not in {files.url}; CACHE must be a folder "
            "that all nodes share, or a URL"
        )


def _missing(tasks: Sequence[DecodeTask], files: Files) -> list[DecodeTask]:
    done = set(files.list("shards"))
    return [task for task in tasks if shard_key(task.split, task.shard.name) not in done]


def decode_shard(task: DecodeTask) -> Counts:
    """Decode a shard into the cache and commit it; returns the numbers of good and bad images.

    Labels are only recorded: the classes are known when all shards are decoded.
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


def _in_process(tasks: Sequence[DecodeTask], verbose: bool) -> Generator[Counts]:
    yield from map(decode_shard, tasks)


def batches(tasks: Sequence[DecodeTask]) -> list[list[DecodeTask]]:
    """Batches of consecutive tasks: a task of Ray for each small folder would be mostly overhead.

    A batch has at most FOLDER_FILES files, and at most a share of the set that leaves work for
    every CPU. Shards that are single files are not batched: their number of images is unknown.
    """
    files = sum(len(task.shard.files) for task in tasks)
    most = min(FOLDER_FILES, -(-files // LEAST_TASKS))
    runs: list[list[DecodeTask]] = []
    held = 0
    for task in tasks:
        n = len(task.shard.files)
        if not runs or n == 0 or held == 0 or held + n > most:
            runs.append([])
            held = 0
        runs[-1].append(task)
        held += n
    return runs


def decode_on_ray(batch: Batch) -> Generator[Batch]:
    """Decode a batch of shards in one task of Ray; each shard is committed by itself."""
    for task in pickle.loads(batch["tasks"][0]):
        yield {name: np.array([count]) for name, count in decode_shard(task).items()}


def _on_ray(tasks: Sequence[DecodeTask], verbose: bool) -> Generator[Counts]:
    # Ray takes seconds to import, and nothing but this needs it.
    from raymem.fleet.cluster import on_cpu_nodes

    runs = batches(tasks)
    with ray_data(verbose=verbose) as ray:
        rows = ray.data.from_items(
            [{"tasks": pickle.dumps(run)} for run in runs], override_num_blocks=len(runs)
        )
        done = rows.map_batches(decode_on_ray, batch_size=1, num_cpus=1, **on_cpu_nodes())
        for batch in batches_of(ray, done, "decoding"):
            for images, bad in zip(batch["images"], batch["bad"], strict=True):
                yield {"images": int(images), "bad": int(bad)}
