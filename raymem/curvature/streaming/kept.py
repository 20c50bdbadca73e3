"""Curvature of a study's images under the models that it kept: the stage after training.

Each pair of a model and a shard is one object, curvature/eps-inf-000017/SHARD.parquet. What is in
the store is not scored again. Scoring a study reads these as it reads what trials measured
themselves: probes have the trial's own seed, so the values are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.blocks import Reading, sample_of
from raymem.curvature.streaming.gather import Gathered, StreamSummary
from raymem.curvature.streaming.pipeline import score
from raymem.curvature.streaming.scorer import ModelSource, Scored, Work
from raymem.curvature.streaming.scorer_options import ScorerOptions
from raymem.curvature.streaming.scoring_model import transform_of
from raymem.curvature.streaming.stream import missing
from raymem.data.shards.records import Shard
from raymem.encoding import counted
from raymem.errors import StoreError
from raymem.fleet import LongStage, StageProgress
from raymem.store import DriverLock, Store, TrialKey
from raymem.training import batch_of


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
    options: ScorerOptions | None = None,
    **settings: Any,
) -> StageSummary:
    """Measure every image of `shards` under the kept models of `keys`, where it is not done yet.

    Shards are those of the study's own images, best of its cache. `options`, of which `settings`
    are fields, are as in `stream_models`. Raises StoreError if a trial is not done or kept no
    weights, and otherwise what `stream_models` raises.
    """
    options = dataclasses.replace(options or ScorerOptions(), **settings)
    absent = sorted(set(keys) - (store.kept() & store.done()))
    if absent:
        raise StoreError(
            f"{len(absent)} models are not there, such as that of {absent[0]}; train first, with "
            "--keep-models for trials that are done"
        )
    summaries = [StreamSummary(model=key.name, shards=len(shards)) for key in keys]
    wanted = missing(store, shards, summaries)
    total = len(keys) * len(shards)
    summary = StageSummary(
        what=f"curvature of {counted(len(keys), 'model')}",
        unit="shards of a model",
        total=total,
        done_before=sum(one.done_before for one in summaries),
        models=len(keys),
    )
    if not wanted:
        return summary
    study = store.study()
    transform = transform_of(study)
    reading = Reading(
        shards=tuple(shards),
        transform=transform,
        n_classes=len(study.classes),
        batch_size=options.batch_size or batch_of(transform.values),
    )
    work = Work(
        store_url=store.url,
        reading=reading,
        models={n: ModelSource(name=key.name, source=key) for n, key in enumerate(keys)},
        wanted=wanted,
        rule=rule,
        threads=options.threads,
        sample=sample_of(reading),
    )
    gathered = Gathered(store, shards, summaries, rule, summary, skip_bad=skip_bad)
    status = {"stage": "curvature"}

    def take(block: Scored) -> None:
        gathered.add(block)
        summary.modes |= {summaries[model].mode for model in block.by_model} - {""}

    with (
        DriverLock(store.files, progress=lambda: {**status, "left": summary.left}) as lock,
        LongStage(lock) as stage,
    ):
        stage.show(summary.snapshot, last=False)
        weight_bytes = store.files.size(keys[0].weights_key)
        scored = score(work, store, options, weight_bytes=weight_bytes)
        stage.collect(scored, take, summary)
    return summary
