"""Blocks of images under several models: `Work` says which, `Scorers` holds them on a device.

The same code in this process and in Ray Data's actors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.curvature import CurvatureRule
from raymem.curvature.streaming.blocks import Decoded, Place, Reading, Sample
from raymem.curvature.streaming.scoring_model import ScoringModel, identity_of
from raymem.errors import CurvatureError
from raymem.store import Store, TrialKey, columns
from raymem.training import Meter, default_device, fast_arithmetic

NOT_FINITE = "the model gives values for it that are not finite"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that is scored, and where workers get it."""

    name: str
    """Name of its folder in the store."""
    source: ScoringModel | TrialKey
    """The model, or the trial that kept it in the store."""
    seed: int | None = None
    """Random seed of its probes; None: the trial's own."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be scored: every image of some shards, under the models that each shard lacks."""

    store_url: str
    reading: Reading
    models: Mapping[int, ModelSource]
    """By their numbers."""
    wanted: Mapping[int, Sequence[int]]
    """Numbers of the models, by the number of the shard."""
    rule: CurvatureRule
    threads: int
    sample: Sample

    @property
    def pairs(self) -> int:
        """Number of pairs of a model and a shard."""
        return sum(len(models) for models in self.wanted.values())

    def passes(self, models_per_pass: int) -> Iterator[Work]:
        """The work in parts of so many models each, all images of a part being decoded once."""
        if models_per_pass < 1:
            raise CurvatureError(f"models_per_pass must be 1 or more, got {models_per_pass}")
        numbers = sorted({model for models in self.wanted.values() for model in models})
        for at in range(0, len(numbers), models_per_pass):
            part = set(numbers[at : at + models_per_pass])
            wanted = {
                shard: [model for model in models if model in part]
                for shard, models in self.wanted.items()
            }
            yield dataclasses.replace(
                self,
                models={number: self.models[number] for number in part},
                wanted={shard: models for shard, models in wanted.items() if models},
            )


@dataclass(frozen=True, kw_only=True)
class Values:
    """What one model gives for the images of a block."""

    errors: Sequence[str]
    """Why an image has no values; "" where it has."""
    values: Mapping[str, NDArray[np.float32]]
    """By column; NaN where there are none."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A block with its scores, without its pixels."""

    place: Place
    example_ids: Sequence[str]
    labels: NDArray[np.int64]
    hashes: Sequence[str]
    by_model: Mapping[int, Values]
    """By the numbers of the models that the shard lacks."""


class Scorers:
    """Holds the models of some work on one device, each from its first block on."""

    def __init__(self, work: Work, store: Store) -> None:
        self.work, self.store = work, store
        self.device = default_device()
        self._held: dict[int, Meter] = {}

    def __call__(self, block: Decoded) -> Scored:
        """The block under each model that its shard lacks."""
        x = torch.from_numpy(block.pixels).to(self.device)
        y = torch.from_numpy(block.labels[block.good]).to(self.device)
        return Scored(
            place=block.place,
            example_ids=block.example_ids,
            labels=block.labels,
            hashes=block.hashes,
            by_model={
                model: self._values(self._meter(model), block, x, y)
                for model in self.work.wanted[block.place.shard]
            },
        )

    def _values(self, meter: Meter, block: Decoded, x: Tensor, y: Tensor) -> Values:
        errors, n = list(block.errors), len(block.errors)
        values = {name: np.full(n, np.nan, np.float32) for name in value_columns(self.work.rule)}
        if len(x):
            with fast_arithmetic(self.work.threads):
                found = meter.all(x, y, self.work.reading.batch_size)
            for name in values:
                values[name][block.good] = found[name]
            finite = np.logical_and.reduce([np.isfinite(v) for v in found.values()])
            for row in block.good[~finite]:
                errors[row] = NOT_FINITE
        return Values(errors=errors, values=values)

    def _meter(self, number: int) -> Meter:
        if number not in self._held:
            self._held[number] = self._load(self.work.models[number])
        return self._held[number]

    def _load(self, which: ModelSource) -> Meter:
        work, model, seed = self.work, which.source, which.seed
        if isinstance(model, TrialKey):
            if seed is None:
                seed = self.store.provenance(model)["seeds"]["init"]
            model = ScoringModel.of_store(self.store, model, name=which.name)
        assert seed is not None
        data = work.reading.shards[0].root
        about = identity_of(self.store, model, work.rule, seed, data, lambda: work.sample)
        # Scorers may run on unlike devices, which would choose other precisions.
        exact = "float32" if work.rule.precision == "auto" else work.rule.precision
        with fast_arithmetic(work.threads):
            return Meter(
                model.net.to(self.device).eval(),
                torch.tensor(work.sample.pixels, device=self.device),
                torch.tensor(work.sample.labels, device=self.device),
                dataclasses.replace(work.rule, mode=about["mode"], precision=exact),
                seed=seed,
                channels_last=model.channels_last,
            )


def value_columns(rule: CurvatureRule) -> list[str]:
    """The columns of values that a rule gives."""
    return [n for n in columns.STREAMED_VALUES if n != "curvature_paper" or rule.paper is not None]
