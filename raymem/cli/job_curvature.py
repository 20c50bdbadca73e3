"""The command line of a job that scores shards under given models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import click

from raymem.cli.base import absolute_store, command_errors
from raymem.curvature import CurvatureRule, PaperRule
from raymem.curvature.streaming import ScoringModel, StreamSummary, stream_curvature
from raymem.data.shards import list_shards
from raymem.encoding import epsilon_name
from raymem.errors import RecipeError
from raymem.fleet import Engine, duration
from raymem.store import Store, TrialKey

SHOWN = 10


def run_curvature_job(doc: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run a job file that scores shards; `doc` is its help.

    Exits with 0 when done, 1 on failure, 2 on wrong usage, 4 without space.
    """

    @click.command(
        help=(doc or "").replace("\n\n", "\n\n\b\n"),
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )
    @click.option(
        "--data", required=True, help="A .tar or .parquet, a pattern with *, a folder, a cache."
    )
    @click.option("--store", required=True, help="Folder or URL; scores go to STORE/curvature.")
    @click.option("--model", "models", multiple=True, help="timm's name; can be given repeatedly.")
    @click.option("--weights", help="State dict for the one --model: .safetensors or torch.save's.")
    @click.option(
        "--n-classes",
        type=click.IntRange(2),
        default=1000,
        help="Classes of the model whose --weights are given.",
    )
    @click.option("--models-of", help="A raymem store that keeps models.")
    @click.option(
        "--trial", "trials", type=int, multiple=True, help="Which of --models-of.  [default: all]"
    )
    @click.option(
        "--epsilon",
        type=float,
        default=math.inf,
        help="Privacy budget of --trial; inf is not private.",
    )
    @click.option("--name", help="Folder of the one model.  [default: the model's name]")
    @click.option(
        "--transform",
        type=click.Choice(["model", "paper"]),
        default="model",
        help="The model's own, or resize 256 and crop 224.",
    )
    @click.option(
        "--on-bad",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        help="At images that cannot be read; skipped ones get a row without scores.",
    )
    @click.option(
        "--mode",
        type=click.Choice(["auto", "gauss-newton", "hessian"]),
        default="auto",
        help="How the trace is computed.",
    )
    @click.option(
        "--probes",
        type=click.IntRange(2),
        default=CurvatureRule.probes,
        help="Hessian-vector products an image, in hessian mode.",
    )
    @click.option(
        "--columns",
        type=click.IntRange(0),
        default=8,
        help="Above 16 classes: most columns computed exactly.",
    )
    @click.option(
        "--logit-probes",
        type=click.IntRange(2),
        default=2,
        help="Above 16 classes: least probes for the rest.",
    )
    @click.option("--paper/--no-paper", default=False, help="The paper's score too.")
    @click.option(
        "--paper-step",
        type=float,
        default=PaperRule.step,
        help="Step h of the paper's score, in [0, 1] pixels.",
    )
    @click.option("--seed", type=click.IntRange(0), default=0, help="Start of the random probes.")
    @click.option(
        "--engine",
        type=click.Choice(["ray", "serial"]),
        default="ray",
        help="serial: in this process, without Ray.",
    )
    @click.option(
        "--scorers",
        type=click.IntRange(1),
        help="Models at work at once.  [default: GPUs, or cores]",
    )
    @click.option(
        "--gpus-per-scorer",
        type=click.FloatRange(0),
        help="Fractions pack models.  [default: 1 if any]",
    )
    @click.option(
        "--batch-size", type=click.IntRange(1), help="Images at once.  [default: by the image size]"
    )
    @click.option(
        "--threads", type=click.IntRange(1, 256), default=1, help="CPU threads of one scorer."
    )
    @click.option("--verbose", is_flag=True, help="Show what Ray says.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    def command(
        data: str,
        store: str,
        on_bad: str,
        mode: str,
        probes: int,
        columns: int,
        logit_probes: int,
        paper: bool,
        paper_step: float,
        seed: int,
        engine: str,
        scorers: int | None,
        gpus_per_scorer: float | None,
        batch_size: int | None,
        threads: int,
        verbose: bool,
        debug: bool,
        **which: Any,
    ) -> None:
        with command_errors(debug):
            rule = CurvatureRule(
                mode=cast(Any, mode),
                columns=columns,
                logit_probes=logit_probes,
                probes=probes,
                paper=PaperRule(step=paper_step) if paper else None,
            )
            opened = Store(absolute_store(store))
            for model in _models(**which):
                shards = list_shards(
                    absolute_store(data, "--data"), model.classes, n_classes=model.n_classes
                )
                summary = stream_curvature(
                    shards,
                    model,
                    opened,
                    rule,
                    seed=seed,
                    skip_bad=on_bad == "skip",
                    engine=cast(Engine, engine),
                    scorers=scorers,
                    gpus_per_scorer=gpus_per_scorer,
                    batch_size=batch_size,
                    threads=threads,
                    verbose=verbose,
                )
                click.echo(stream_text(summary, opened))

    command.main(args=None if arguments is None else list(arguments), standalone_mode=True)


def _models(
    models: Sequence[str],
    weights: str | None,
    n_classes: int,
    models_of: str | None,
    trials: Sequence[int],
    epsilon: float,
    name: str | None,
    transform: str,
) -> Iterator[ScoringModel]:
    """The models asked for, loaded one after the other."""
    paper = transform == "paper"
    if (models_of is None) == (not models):
        raise RecipeError("give --model, or --models-of a raymem store that keeps models")
    if weights is not None and (len(models) != 1 or models_of is not None):
        raise RecipeError("--weights needs exactly one --model, whose architecture they fit")
    if models_of is None:
        if name is not None and len(models) > 1:
            raise RecipeError("--name needs exactly one --model")
        for model in models:
            yield ScoringModel.of_timm(
                model, weights=weights, n_classes=n_classes, name=name, paper=paper
            )
        return
    source = Store(absolute_store(models_of, "--models-of"))
    keys = [TrialKey(epsilon, trial) for trial in trials]
    keys = keys or sorted(key for key in source.kept() if key.epsilon == epsilon)
    if not keys:
        source.study()  # says so if there is no store at all
        raise RecipeError(
            f"{source.url} keeps no models at epsilon {epsilon_name(epsilon)}; train its study "
            "with --keep-models"
        )
    if name is not None and len(keys) > 1:
        raise RecipeError("--name needs exactly one --trial")
    for key in keys:
        yield ScoringModel.of_store(source, key, name=name, paper=paper)


def stream_text(summary: StreamSummary, store: Store) -> str:
    """What a run did, and where the scores are."""
    s = summary
    lines = [
        f"{s.model}: {s.shards:,} shards, {s.done_before:,} of them scored before; mode {s.mode}"
    ]
    if s.scored:
        lines.append(
            f"{s.scored:,} images scored in {duration(s.seconds)}, {s.scored / s.seconds:,.1f} a "
            "second"
        )
    if s.bad:
        lines.append(f"{len(s.bad):,} images NOT scored:")
        lines += [f"  {b.shard}: {b.example_id}: {b.error}" for b in s.bad[:SHOWN]]
        if len(s.bad) > SHOWN:
            lines.append(f"  and {len(s.bad) - SHOWN:,} more")
        lines.append(
            "  their rows have ok = false; to score them after a repair, delete the objects of "
            "their shards and run again"
        )
    if s.repeated:
        lines.append(
            f"ids are NOT unique in {len(s.repeated):,} shards, such as {s.repeated[0]}: they "
            "cannot be joined with memorization"
        )
    lines.append(f"scores: {store.files.path(f'curvature/{s.model}')}")
    if store.files.exists("study.json"):
        lines.append(f"beside memorization: raymem scores {store.url} --with {s.model}")
    return "\n".join(lines)
