"""Shards and a model -> curvature/MODEL/SHARD.parquet, one object per shard, each once.

Ray Data reads and decodes shards in tasks on CPU workers, and scores in actors that hold the model;
it holds decoding back when scoring is behind. What comes out are numbers, which the driver gathers
until a shard is whole. What is in the store is not scored again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymem.curvature import CHECKED, CurvatureRule, pick_mode
from raymem.errors import ExamplesError, FleetError, StudyMismatchError
from raymem.fleet import Engine, ProgressLine, Stopped, stop_signals
from raymem.shards.gather import Gathered, StreamSummary
from raymem.shards.models import ScoringModel
from raymem.shards.on_ray import batches_of, ray_data
from raymem.shards.readers import read_shard
from raymem.shards.records import Shard
from raymem.shards.transform import Transform
from raymem.shards.work import Batch, RayScorer, Scorer, Task, decode, read, read_on_ray
from raymem.store import DriverLock, Files, Store
from raymem.training import as_input, batch_of
from raymem.version import VERSION

READERS = 2


def stream_curvature(
    shards: Sequence[Shard],
    model: ScoringModel,
    store: Store,
    rule: CurvatureRule | None = None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    engine: Engine = "ray",
    scorers: int | None = None,
    gpus_per_scorer: float | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    verbose: bool = False,
) -> StreamSummary:
    """Score what `store` does not have yet of `shards`, under `model`.

    `scorers` actors hold the model, with `gpus_per_scorer` GPUs (by default 1 where the cluster has
    any), else `threads` CPUs each; by default as many as fit, two CPUs of a cluster being left to
    read. A single image that does not fit on its device is an error; larger batches are halved.

    Raises ExamplesError at the first image that cannot be read, unless `skip_bad`: then it has a
    row without scores. Raises StudyMismatchError if curvature/MODEL was made by another model,
    transform or rule, FleetError on clusters too small, and Stopped after Ctrl-C.
    """
    rule = rule or CurvatureRule()
    done = store.streamed_shards(model.name)
    missing = [shard for shard in shards if shard.name not in done]
    summary = StreamSummary(
        model=model.name, shards=len(shards), done_before=len(shards) - len(missing)
    )
    about = _identity(store, model, rule, seed, shards)
    summary.mode = about["mode"]
    if not missing:
        return summary
    task = Task(
        shards=missing,
        transform=model.transform,
        n_classes=model.n_classes,
        rule=dataclasses.replace(rule, mode=about["mode"]),
        seed=seed,
        batch_size=batch_size or batch_of(_values(model.transform)),
        threads=threads,
        channels_last=model.channels_last,
    )
    run: Callable[..., Generator[Batch]] = _on_ray if engine == "ray" else _in_process
    gathered = Gathered(store, model, task, about, summary, skip_bad)
    line = ProgressLine()
    folder = Files(f"{store.url}/curvature/{model.name}")
    with (
        DriverLock(folder, progress=lambda: {"shards_left": gathered.left}),
        stop_signals() as stops,
    ):
        try:
            # Closed at once, whatever happens, so that workers end with the run.
            with contextlib.closing(run(task, model, scorers, gpus_per_scorer, verbose)) as batches:
                for batch in batches:
                    gathered.add(batch)
                    line.show_text(gathered.progress(), last=gathered.left == 0)
                    if stops.count and gathered.left:
                        raise Stopped(
                            f"stopped after {summary.shards - gathered.left:,} of "
                            f"{summary.shards:,} shards; run the same command again to go on"
                        )
        finally:
            line.close()
    return summary


def _values(transform: Transform) -> int:
    return transform.size[0] * transform.size[1] * (1 if transform.grey else 3)


def _identity(
    store: Store, model: ScoringModel, rule: CurvatureRule, seed: int, shards: Sequence[Shard]
) -> dict[str, Any]:
    """curvature/MODEL/_about.json, made or checked: what makes its shards comparable."""
    # With an underscore, so that Arrow and pandas read the folder as one table, this left out.
    key = f"curvature/{model.name}/_about.json"
    # Names of shards are relative to the set: another set's would be taken for done.
    about = {"data": shards[0].root, **model.as_dict(), "rule": rule.as_dict(), "seed": seed}
    here = json.loads(json.dumps(about))
    if not store.files.exists(key):
        mode = rule.mode if rule.mode != "auto" else _pick_mode(model, shards, seed)
        text = json.dumps({**here, "mode": mode, "raymem": VERSION}, indent=1)
        store.files.create(key, text.encode() + b"\n")
    there: dict[str, Any] = json.loads(store.files.read(key))
    differences = [
        f"{name}: there {there.get(name)}, here {here[name]}"
        for name in here
        if there.get(name) != here[name]
    ]
    if differences:
        raise StudyMismatchError(
            f"curvature/{model.name} in {store.url} was made otherwise ({'; '.join(differences)}); "
            "choose another --name or --store, or go back to those settings"
        )
    return there


def _pick_mode(model: ScoringModel, shards: Sequence[Shard], seed: int) -> str:
    """From the first few images that can be read."""
    found: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first = ""
    for record in (record for shard in shards for record in read_shard(shard)):
        pixels, error = decode(record, model.transform, model.n_classes)
        first = first or (error and f"; the first, {record.example_id}: {error}")
        if pixels is not None:
            found.append(pixels)
            labels.append(record.label or 0)
        if len(found) == CHECKED:
            break
    if not found:
        raise ExamplesError(
            "no image of the set can be read and has a label of the model"
            f"{first}; check --data and --model"
        )
    x = as_input(torch.from_numpy(np.stack(found)), torch.contiguous_format)
    return pick_mode(model.net.cpu(), x, torch.tensor(labels), seed=seed)


def _in_process(
    task: Task, model: ScoringModel, scorers: int | None, gpus: float | None, verbose: bool
) -> Generator[Batch]:
    scorer = Scorer(task, model)
    for number in range(len(task.shards)):
        for batch in read(task, number):
            yield scorer(batch)


def _on_ray(
    task: Task, model: ScoringModel, scorers: int | None, gpus: float | None, verbose: bool
) -> Generator[Batch]:
    cores = os.cpu_count() or 1
    # A local Ray gets two slots for reading beside one for each core: an actor that had a core's
    # slot for itself would leave none to read with on small machines, and nothing would move.
    with ray_data(num_cpus=cores + READERS, verbose=verbose) as ray:
        n, held = _actors(ray.cluster_resources(), task.threads, scorers, gpus)
        rows = ray.data.from_items(
            [{"number": number} for number in range(len(task.shards))],
            override_num_blocks=len(task.shards),
        )
        # In a list a reference stays one; alone, Ray Data would put its value in its place.
        shared, net = [ray.put(task)], [ray.put(model)]
        decoded = rows.map_batches(
            read_on_ray, batch_size=1, num_cpus=1, fn_kwargs={"task": shared}
        )
        scored = decoded.map_batches(
            RayScorer,
            batch_size=task.batch_size,
            compute=ray.data.ActorPoolStrategy(size=n),
            # Other than the reader's, so that Ray Data does not put decoding into these actors.
            scheduling_strategy="SPREAD",
            fn_constructor_args=(shared, net),
            **held,
        )
        yield from batches_of(ray, scored, "scoring")


def _actors(
    resources: Mapping[str, float], threads: int, scorers: int | None, gpus: float | None
) -> tuple[int, dict[str, float]]:
    """How many scoring actors, and what each of them holds.

    >>> _actors({"CPU": 8, "GPU": 2}, 1, None, None), _actors({"CPU": 4}, 1, None, None)
    ((2, {'num_gpus': 1.0}), (2, {'num_cpus': 1.0}))
    """
    there = resources.get("GPU", 0.0)
    each = gpus if gpus is not None else (1.0 if there else 0.0)
    if each > 0:
        return scorers or max(1, int(there / each)), {"num_gpus": each}
    cpus = int(resources.get("CPU", 0))
    n = scorers or max(1, (cpus - READERS) // threads)
    if n * threads >= cpus:
        raise FleetError(
            f"{n} scorers of {threads} CPUs leave none of the cluster's {cpus} CPUs to read with; "
            "take fewer --scorers or --threads, or a larger cluster"
        )
    return n, {"num_cpus": float(threads)}
