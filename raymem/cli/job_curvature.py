"""The command line of a job that scores shards under given models."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import click

from raymem.cli.options import run_command
from raymem.curvature import CurvatureRule
from raymem.curvature.streaming import (
    ScorerOptions,
    ScoringModel,
    StreamSummary,
    stream_models,
)
from raymem.curvature.streaming.pipeline import models_that_fit, scorer_memory
from raymem.data.shards import list_shards
from raymem.encoding import counted, duration, epsilon_name
from raymem.errors import RecipeError
from raymem.settings import Setting
from raymem.store import Store, TrialKey

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The models."""

    models: Annotated[tuple[str, ...], Setting(option="model", repeated=True)] = ()
    """A model of timm by its name; can be repeated."""
    weights: str | None = None
    """File with the state dict of the one --model, from safetensors or torch.save; None: timm's
    pretrained weights."""
    n_classes: Annotated[int, Setting(least=2)] = 1000
    """Number of classes of the model whose --weights are given."""
    models_of: Annotated[str | None, Setting(path=True)] = None
    """Take models from this raymem store, in place of --model; its study ran with --keep-models."""
    trials: Annotated[tuple[int, ...], Setting(option="trial", repeated=True)] = ()
    """Trial of --models-of whose model is scored; can be repeated; none: all kept ones."""
    epsilon: float = math.inf
    """Privacy budget of --trial; inf is not private."""
    name: str | None = None
    """Folder of the scores of the one model, below STORE/curvature; None: the model's name."""
    transform: Literal["model", "paper"] = "model"
    """How images are resized: as the model's weights want them, or to 256 with a crop of 224."""

    def load(self) -> Iterator[ScoringModel]:
        """The models, one after the other. Raises RecipeError if it is not clear which."""
        paper = self.transform == "paper"
        if (self.models_of is None) == (not self.models):
            raise RecipeError("give --model, or --models-of a raymem store that keeps models")
        if self.weights is not None and (len(self.models) != 1 or self.models_of is not None):
            raise RecipeError("--weights needs exactly one --model, whose architecture they fit")
        if self.models_of is not None:
            yield from self._kept(self.models_of, paper)
            return
        if self.name is not None and len(self.models) > 1:
            raise RecipeError("--name needs exactly one --model")
        for model in self.models:
            yield ScoringModel.of_timm(
                model, weights=self.weights, n_classes=self.n_classes, name=self.name, paper=paper
            )

    def _kept(self, url: str, paper: bool) -> Iterator[ScoringModel]:
        source = Store(url)
        keys = [TrialKey(self.epsilon, trial) for trial in self.trials]
        keys = keys or sorted(key for key in source.kept() if key.epsilon == self.epsilon)
        if not keys:
            source.study()  # says so if there is no store at all
            raise RecipeError(
                f"{source.url} keeps no models at epsilon {epsilon_name(self.epsilon)}; train its "
                "study with --keep-models"
            )
        if self.name is not None and len(keys) > 1:
            raise RecipeError("--name needs exactly one --trial")
        for key in keys:
            yield ScoringModel.of_store(source, key, name=self.name, paper=paper)


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Images and scores."""

    data: Annotated[str, Setting(path=True, required=True)] = ""
    """Images: a .tar or .parquet file, a pattern with *, a folder, a cache; a path or a URL."""
    store: Annotated[str, Setting(path=True, required=True)] = ""
    """Folder or URL; scores go to STORE/curvature/MODEL."""
    models: ModelSettings = field(default_factory=ModelSettings)
    """Under which models."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do with images that cannot be read; skipped ones get a row without scores."""
    curvature: Annotated[CurvatureRule, Setting(without=("every_epochs",))] = field(
        default_factory=lambda: CurvatureRule(paper=None)
    )
    """How curvature is measured."""
    seed: Annotated[int, Setting(least=0)] = 0
    """Random seed of the probes."""
    options: ScorerOptions = field(default_factory=ScorerOptions)
    """What images are scored on."""


def run_curvature_job(
    settings: ScoringSettings | None = None, *, arguments: Sequence[str] | None = None
) -> None:
    """Run a job file that scores shards, each of whose `settings` an option can change.

    Exits as `run_command` does.
    """
    run_command(_score, settings or ScoringSettings(), arguments=arguments)


def _score(settings: ScoringSettings) -> None:
    store = Store(settings.store)
    for models in _together(settings.models.load(), settings.options.models_per_pass):
        first = models[0]
        summaries = stream_models(
            list_shards(settings.data, first.classes, n_classes=first.n_classes),
            models,
            store,
            settings.curvature,
            seed=settings.seed,
            skip_bad=settings.on_bad == "skip",
            options=settings.options,
        )
        for summary in summaries:
            click.echo(stream_text(summary, store))


def _together(models: Iterable[ScoringModel], most: int | None) -> Iterator[list[ScoringModel]]:
    """Neighbours that take the same pixels: as many as this process may hold, `most` if given."""
    held: list[ScoringModel] = []
    for model in models:
        fit = most or models_that_fit(model.weight_bytes, scorer_memory(0.0, os.cpu_count() or 1))
        if held and (len(held) >= fit or model.pixels != held[0].pixels):
            yield held
            held = []
        held.append(model)
    if held:
        yield held


def stream_text(summary: StreamSummary, store: Store) -> str:
    """What a run did, and where the scores are."""
    s = summary
    lines = [
        f"{s.model}: {counted(s.shards, 'shard')}, {s.done_before:,} of them scored before; mode "
        f"{s.mode}"
    ]
    if s.scored:
        lines.append(
            f"{counted(s.scored, 'image')} scored in {duration(s.seconds)}, "
            f"{s.scored / s.seconds:,.1f} a second"
        )
    if s.bad:
        lines.append(f"{counted(len(s.bad), 'image')} NOT scored:")
        lines += [f"  {b.shard}: {b.example_id}: {b.error}" for b in s.bad[:SHOWN]]
        if len(s.bad) > SHOWN:
            lines.append(f"  and {len(s.bad) - SHOWN:,} more")
        lines.append(
            "  their rows have ok = false; to score them after a repair, delete the objects of "
            "their shards and run again"
        )
    if s.repeated:
        lines.append(
            f"ids are NOT unique in {counted(len(s.repeated), 'shard')}, such as {s.repeated[0]}: "
            "they cannot be joined with memorization"
        )
    lines.append(f"scores: {store.files.path(f'curvature/{s.model}')}")
    if store.files.exists("study.json"):
        lines.append(f"beside memorization: raymem scores {store.url} --with {s.model}")
    return "\n".join(lines)
