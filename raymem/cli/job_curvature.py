"""The command line of a job that scores shards under given models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import click

from raymem.cli.options import run_command
from raymem.curvature import CurvatureRule
from raymem.curvature.streaming import ScoringModel, StreamSummary, stream_curvature
from raymem.data.shards import list_shards
from raymem.encoding import counted, duration, epsilon_name
from raymem.errors import RecipeError
from raymem.fleet import Engine
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
    engine: Engine = "ray"
    """Where models run; serial: in this process, without Ray."""
    scorers: Annotated[int | None, Setting(least=1)] = None
    """Copies of the model at work at once; None: one for each GPU, or core."""
    gpus_per_scorer: Annotated[float | None, Setting(least=0)] = None
    """GPUs of each copy; a fraction packs several on one GPU; None: 1 if there are any, else 0."""
    batch_size: Annotated[int | None, Setting(least=1)] = None
    """Images in a batch; None: by the size of the images."""
    threads: Annotated[int, Setting(least=1, most=256)] = 1
    """CPU threads of each copy."""
    verbose: bool = False
    """Show Ray's own output."""


def run_curvature_job(
    settings: ScoringSettings | None = None, *, arguments: Sequence[str] | None = None
) -> None:
    """Run a job file that scores shards, each of whose `settings` an option can change.

    Exits as `run_command` does.
    """
    run_command(_score, settings or ScoringSettings(), arguments=arguments)


def _score(settings: ScoringSettings) -> None:
    store = Store(settings.store)
    for model in settings.models.load():
        shards = list_shards(settings.data, model.classes, n_classes=model.n_classes)
        summary = stream_curvature(
            shards,
            model,
            store,
            settings.curvature,
            seed=settings.seed,
            skip_bad=settings.on_bad == "skip",
            engine=settings.engine,
            scorers=settings.scorers,
            gpus_per_scorer=settings.gpus_per_scorer,
            batch_size=settings.batch_size,
            threads=settings.threads,
            verbose=settings.verbose,
        )
        click.echo(stream_text(summary, store))


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
