"""Shards and a model -> curvature/MODEL/SHARD.parquet, one object per shard, each once.

Ray Data reads and decodes shards in tasks on CPU workers, and scores in actors that hold the model;
it holds decoding back when scoring is behind. What comes out are numbers, which the driver gathers
until a shard is whole. What is in the store is not scored again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.gather import Gathered, StreamSummary
from raymem.curvature.streaming.scorer import RayScorer, Scorer, Task, read, read_on_ray
from raymem.curvature.streaming.scoring_model import ScoringModel, identity_of
from raymem.data.shards.ray_data import actors, batches_of, ray_data, with_readers
from raymem.data.shards.records import Shard
from raymem.data.shards.transform import Batch
from raymem.errors import CurvatureError
from raymem.fleet import Engine, LongStage
from raymem.store import DriverLock, Files, Store
from raymem.training import batch_of


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
    if rule.every_epochs is not None:
        raise CurvatureError(
            "one model's weights have no epochs to average over; leave every_epochs out"
        )
    done = store.streamed_shards(model.name)
    missing = [shard for shard in shards if shard.name not in done]
    summary = StreamSummary(
        model=model.name, shards=len(shards), done_before=len(shards) - len(missing)
    )
    about = identity_of(store, model, rule, seed, shards)
    summary.mode = about["mode"]
    if not missing:
        return summary
    task = Task(
        shards=missing,
        transform=model.transform,
        n_classes=model.n_classes,
        rule=dataclasses.replace(rule, mode=about["mode"]),
        seed=seed,
        batch_size=batch_size or batch_of(model.transform.values),
        threads=threads,
        channels_last=model.channels_last,
    )
    run = _on_ray if engine == "ray" else _in_process
    gathered = Gathered(store, model, task, about, summary, skip_bad)
    folder = Files(f"{store.url}/curvature/{model.name}")
    status = {"stage": "curvature"}
    with (
        DriverLock(folder, progress=lambda: {**status, "left": gathered.progress.left}) as lock,
        LongStage(lock) as stage,
    ):
        results = run(task, model, scorers, gpus_per_scorer, verbose)
        stage.collect(results, gathered.add, gathered.progress)
    return summary


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
    with ray_data(num_cpus=with_readers(), verbose=verbose) as ray:
        n, held = actors(ray.cluster_resources(), task.threads, scorers, gpus)
        rows = ray.data.from_items(
            [{"number": number} for number in range(len(task.shards))],
            override_num_blocks=len(task.shards),
        )
        # In a list the reference is passed on; alone, Ray Data would replace it by its value.
        shared, net = [ray.put(task)], [ray.put(model)]
        decoded = rows.map_batches(
            read_on_ray, batch_size=1, num_cpus=1, fn_kwargs={"task": shared}
        )
        scored = decoded.map_batches(
            RayScorer,
            batch_size=task.batch_size,
            compute=ray.data.ActorPoolStrategy(size=n),
            # Differs from the reader's, so that Ray Data does not fuse decoding into these actors.
            scheduling_strategy="SPREAD",
            fn_constructor_args=(shared, net),
            **held,
        )
        yield from batches_of(ray, scored, "scoring")
