"""Curvature of a study's images under the models that it kept: the stage after training.

Each pair of a model and a shard is one task and one object, curvature/eps-inf-000017/SHARD.parquet.
Tasks come model by model to actors that hold the last model they were given, so each actor loads
each model once at most. What is in the store is not scored again. Scoring a study reads these as it
reads what trials measured themselves: probes have the trial's own seed, so the values are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.gather import Gathered, StreamSummary
from raymem.curvature.streaming.scorer import Scorer, Task, read
from raymem.curvature.streaming.scoring_model import ScoringModel, identity_of
from raymem.data.shards.ray_data import actors, batches_of, ray_data, with_readers
from raymem.data.shards.records import Shard
from raymem.data.shards.transform import Batch
from raymem.encoding import counted
from raymem.errors import StoreError
from raymem.fleet import Engine, LongStage, StageProgress
from raymem.store import DriverLock, Store, TrialKey
from raymem.training import batch_of

# Ray Data plans each block by itself; more would only cost its driver.
MOST_BLOCKS = 5_000


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all tasks share."""

    store_url: str
    keys: tuple[TrialKey, ...]
    """The models, by their trials."""
    shards: tuple[Shard, ...]
    rule: CurvatureRule
    skip_bad: bool
    batch_size: int | None
    threads: int


@dataclass(kw_only=True)
class StageSummary(StageProgress):
    """What one run did; its units are pairs of a model and a shard."""

    models: int
    modes: set[str] = field(default_factory=set)
    """How traces were computed."""


def measure_kept(
    store: Store,
    keys: Sequence[TrialKey],
    shards: Sequence[Shard],
    rule: CurvatureRule,
    *,
    skip_bad: bool = False,
    engine: Engine = "ray",
    scorers: int | None = None,
    gpus_per_scorer: float | None = None,
    batch_size: int | None = None,
    threads: int = 1,
    verbose: bool = False,
) -> StageSummary:
    """Measure every image of `shards` under the kept models of `keys`, where it is not done yet.

    Shards are those of the study's own images, best of its cache. `scorers` actors hold a model
    each, as in `stream_curvature`. Raises StoreError if a trial is not done or kept no weights, and
    otherwise what `stream_curvature` raises.
    """
    absent = sorted(set(keys) - (store.kept() & store.done()))
    if absent:
        raise StoreError(
            f"{len(absent)} models are not there, such as that of {absent[0]}; train first, with "
            "--keep-models for trials that are done"
        )
    stage_task = Stage(
        store_url=store.url,
        keys=tuple(keys),
        shards=tuple(shards),
        rule=rule,
        skip_bad=skip_bad,
        batch_size=batch_size,
        threads=threads,
    )
    tasks = _missing(store, stage_task)
    total = len(keys) * len(shards)
    summary = StageSummary(
        what=f"curvature of {counted(len(keys), 'model')}",
        unit="shards of a model",
        total=total,
        done_before=total - len(tasks),
        models=len(keys),
    )
    if not tasks:
        return summary
    run = _on_ray if engine == "ray" else _in_process
    status = {"stage": "curvature"}

    def take(batch: Batch) -> None:
        summary.modes |= set(batch["mode"].tolist())
        counts = {name: int(batch[name].sum()) for name in ("images", "bad")}
        summary.add(done=len(batch["images"]), **counts)

    with (
        DriverLock(store.files, progress=lambda: {**status, "left": summary.left}) as lock,
        LongStage(lock) as stage,
    ):
        stage.show(summary.snapshot, last=False)
        stage.collect(run(stage_task, tasks, scorers, gpus_per_scorer, verbose), take, summary)
    return summary


def _missing(store: Store, stage: Stage) -> list[tuple[int, int]]:
    """(model, shard) of what is not in the store, model by model."""
    missing = []
    for model, key in enumerate(stage.keys):
        done = store.streamed_shards(key.name)
        missing += [(model, i) for i, shard in enumerate(stage.shards) if shard.name not in done]
    return missing


class KeptScorer:
    """Runs tasks one after the other; keeps the model of the last one."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.store = stage, Store(stage.store_url)
        self._held: int | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Run the tasks in columns `model` and `shard`; returns a row of counts for each."""
        done = [
            self._do(int(m), int(s)) for m, s in zip(batch["model"], batch["shard"], strict=True)
        ]
        return {name: np.array([row[name] for row in done]) for name in done[0]}

    def _do(self, model: int, shard: int) -> dict[str, Any]:
        if model != self._held:
            self._load(model)
        task = dataclasses.replace(self.task, shards=[self.stage.shards[shard]])
        summary = StreamSummary(model=self.model.name, shards=1, done_before=0)
        gathered = Gathered(self.store, self.model, task, self.about, summary, self.stage.skip_bad)
        for rows in read(task, 0):
            gathered.add(self.scorer(rows))
        return {"images": summary.scored, "bad": len(summary.bad), "mode": self.about["mode"]}

    def _load(self, number: int) -> None:
        stage, key = self.stage, self.stage.keys[number]
        self.model = ScoringModel.of_store(self.store, key)
        seed = self.store.provenance(key)["seeds"]["init"]
        self.about = identity_of(self.store, self.model, stage.rule, seed, stage.shards)
        self.task = Task(
            shards=stage.shards,
            transform=self.model.transform,
            n_classes=self.model.n_classes,
            rule=dataclasses.replace(stage.rule, mode=self.about["mode"]),
            seed=seed,
            batch_size=stage.batch_size or batch_of(self.model.transform.values),
            threads=stage.threads,
            channels_last=self.model.channels_last,
        )
        self.scorer = Scorer(self.task, self.model)
        self._held = number


def _in_process(
    stage: Stage,
    tasks: Sequence[tuple[int, int]],
    scorers: int | None,
    gpus: float | None,
    verbose: bool,
) -> Generator[Batch]:
    scorer = KeptScorer(stage)
    for model, shard in tasks:
        yield scorer({"model": np.array([model]), "shard": np.array([shard])})


def _on_ray(
    stage: Stage,
    tasks: Sequence[tuple[int, int]],
    scorers: int | None,
    gpus: float | None,
    verbose: bool,
) -> Generator[Batch]:
    with ray_data(num_cpus=with_readers(), verbose=verbose) as ray:
        n, held = actors(ray.cluster_resources(), stage.threads, scorers, gpus)
        rows = ray.data.from_items(
            [{"model": model, "shard": shard} for model, shard in tasks],
            override_num_blocks=min(len(tasks), MOST_BLOCKS),
        )
        shared = [ray.put(stage)]
        done = rows.map_batches(
            RayKeptScorer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=n),
            fn_constructor_args=(shared,),
            **held,
        )
        yield from batches_of(ray, done, "measuring curvature")


class RayKeptScorer:
    """A `KeptScorer` as an actor of Ray Data."""

    def __init__(self, stage: Any) -> None:
        import ray

        self.scorer = KeptScorer(ray.get(stage[0]))

    def __call__(self, batch: Batch) -> Batch:
        return self.scorer(batch)
