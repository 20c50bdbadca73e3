"""Shards and models -> curvature/MODEL/SHARD.parquet, one object per pair, each once.

What is in the store is not scored again. How it is scored is `raymem.curvature.streaming.pipeline`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.blocks import Reading, sample_of
from raymem.curvature.streaming.gather import Gathered, StreamSummary
from raymem.curvature.streaming.pipeline import score
from raymem.curvature.streaming.scorer import ModelSource, Scored, Work
from raymem.curvature.streaming.scorer_options import ScorerOptions
from raymem.curvature.streaming.scoring_model import ScoringModel, identity_of
from raymem.data.shards.records import Shard
from raymem.encoding import counted
from raymem.errors import CurvatureError
from raymem.fleet import LongStage, StageProgress
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
    options: ScorerOptions | None = None,
    **settings: Any,
) -> StreamSummary:
    """Score what `store` does not have yet of `shards`, under `model`; see `stream_models`."""
    options = dataclasses.replace(options or ScorerOptions(), **settings)
    (summary,) = stream_models(
        shards, [model], store, rule, seed=seed, skip_bad=skip_bad, options=options
    )
    return summary


def stream_models(
    shards: Sequence[Shard],
    models: Sequence[ScoringModel],
    store: Store,
    rule: CurvatureRule | None = None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    options: ScorerOptions | None = None,
    **settings: Any,
) -> list[StreamSummary]:
    """Score what `store` does not have yet of `shards`, under each of `models`.

    Models must take the same pixels. Each image is decoded once for `models_per_pass` of them, and
    the scores are those of each model alone, to the bit. By default there are as many scorers as
    fit, two CPUs of a cluster being left to read. A single image that does not fit on its device is
    an error; larger batches are halved. `settings` are fields of `options`.

    Raises ExamplesError at the first image that cannot be read, unless `skip_bad`: then it has a
    row without scores. Raises StudyMismatchError if curvature/MODEL was made by another model,
    transform or rule, CurvatureError if models take different pixels, FleetError on clusters too
    small, and Stopped after Ctrl-C.
    """
    options = dataclasses.replace(options or ScorerOptions(), **settings)
    rule = rule or CurvatureRule()
    if rule.every_epochs is not None:
        raise CurvatureError(
            "one model's weights have no epochs to average over; leave every_epochs out"
        )
    other = next((model for model in models if model.pixels != models[0].pixels), None)
    if other is not None:
        raise CurvatureError(
            f"{models[0].name} and {other.name} take different pixels or classes; score them in "
            "one pass each"
        )
    reading = Reading(
        shards=tuple(shards),
        transform=models[0].transform,
        n_classes=models[0].n_classes,
        batch_size=options.batch_size or batch_of(models[0].transform.values),
    )
    sample = functools.cache(lambda: sample_of(reading))
    summaries = []
    for model in models:
        about = identity_of(store, model, rule, seed, shards[0].root, sample)
        summaries.append(StreamSummary(model=model.name, shards=len(shards), mode=about["mode"]))
    wanted = missing(store, shards, summaries)
    if not wanted:
        return summaries
    work = Work(
        store_url=store.url,
        reading=reading,
        models={
            number: ModelSource(name=model.name, source=model, seed=seed)
            for number, model in enumerate(models)
        },
        wanted=wanted,
        rule=rule,
        threads=options.threads,
        sample=sample(),
    )
    one = len(models) == 1
    total = len(models) * len(shards)
    progress = StageProgress(
        what="curvature" if one else f"curvature of {counted(len(models), 'model')}",
        unit="shards" if one else "shards of a model",
        total=total,
        done_before=total - work.pairs,
    )
    gathered = Gathered(store, shards, summaries, rule, progress, skip_bad=skip_bad)
    with contextlib.ExitStack() as held:
        status = {"stage": "curvature"}
        locks = [
            held.enter_context(
                DriverLock(
                    Files(f"{store.url}/curvature/{model.name}"),
                    progress=lambda: {**status, "left": progress.left},
                )
            )
            for model in models
        ]

        def take(block: Scored) -> None:
            for lock in locks:
                lock.check()
            gathered.add(block)

        stage = held.enter_context(LongStage(locks[0]))
        weight_bytes = max(model.weight_bytes for model in models)
        scored = score(work, store, options, weight_bytes=weight_bytes)
        stage.collect(scored, take, progress)
    return summaries


def missing(
    store: Store, shards: Sequence[Shard], summaries: Sequence[StreamSummary]
) -> dict[int, list[int]]:
    """Numbers of the models that each shard is not scored under, by its number.

    Counts in `summaries` what is done.
    """
    wanted: dict[int, list[int]] = {}
    for model, summary in enumerate(summaries):
        done = store.streamed_shards(summary.model)
        lacking = [number for number, shard in enumerate(shards) if shard.name not in done]
        summary.done_before = len(shards) - len(lacking)
        for number in lacking:
            wanted.setdefault(number, []).append(model)
    return dict(sorted(wanted.items()))
