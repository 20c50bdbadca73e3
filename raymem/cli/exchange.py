"""Commands that make stores and caches of other things, and other things of stores."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import click
import pyarrow.compute as pc

from raymem.cli.base import command_errors, debug_option, main
from raymem.cli.options import filled, setting_options
from raymem.data import load_examples
from raymem.errors import ImportFileError
from raymem.fleet import Engine, ProgressLine, Snapshot, seconds_left
from raymem.interop import EXPORTS, FORMATS, export
from raymem.settings import Setting
from raymem.show import ingest_text, merge_text, summary_text
from raymem.store import merge

SCORES = ("fz-scores", "c-scores")


@dataclass(frozen=True, kw_only=True)
class CacheImages:
    """The cache: how images become one."""

    size: Annotated[int, Setting(least=1)] = 128
    """Height and width of the cache's images, in pixels."""
    val_labels: str | None = None
    """File with the labels of a flat folder of validation images; None: searched for."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with images that cannot be read; quarantine leaves them out and lists them."""


@dataclass(frozen=True, kw_only=True)
class IngestOptions(CacheImages):
    """Ingest: where the images are and how they are read."""

    train: str | None = None
    """Training images: a folder or a pattern below DATA, or a URL; None: searched for."""
    val: str | None = None
    """Validation images, which become the test set, in the same way; None: searched for."""
    grey: bool = False
    """Keep one channel in place of three."""
    engine: Engine = "ray"
    """Where images are decoded; serial: in this process, without Ray."""
    verbose: bool = False
    """Show Ray's own output."""


@main.command("merge")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.argument("out", metavar="OUT")
@debug_option
def merge_command(first: str, second: str, out: str, debug: bool) -> None:
    """Merge two parts of one study, such as of two clusters, into one store; score it next.

    OUT: a new store, one that such a merge began, or A itself. Trials that both have must be the
    same; of those that differ because of other hardware, A's stay. Checkpoints, scores and pages
    are not copied.

    Example: raymem merge runs/east runs/west runs/whole
    """
    with command_errors(debug):
        with contextlib.closing(ProgressLine()) as line:
            summary = merge(first, second, out, progress=_merging(line))
        click.echo(merge_text(summary))


def _merging(line: ProgressLine) -> Callable[[int, int], None]:
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        left = seconds_left(done, total - done, time.monotonic() - start)
        snapshot = Snapshot(what="merging", unit="parts", done=done, total=total, seconds_left=left)
        line.show(snapshot, last=snapshot.complete)

    return show


@main.command("import")
@click.argument("format", type=click.Choice([*FORMATS, *SCORES]))
@click.argument("path")
@click.argument("store")
@click.option(
    "--data", help="Data set it was trained on; rows are joined to its examples and checked."
)
@click.option("--labels", help="File of class numbers of the training examples, in its order.")
@click.option("--ids", help="File of ids, names or hashes of the training examples, in its order.")
@click.option("--test-ids", help="File of ids, names or hashes of the test examples.")
@click.option("--trials", type=click.IntRange(1), help="Import only this many models of a fleet.")
@debug_option
def import_command(
    format: str,
    path: str,
    store: str,
    data: str | None,
    trials: int | None,
    debug: bool,
    **order: str | None,
) -> None:
    """Make a store from a fleet that was trained elsewhere and score it, or from published scores.

    npz: arrays masks and correct_train (bool [trials, train examples]) and, if you like,
    correct_test, margins_train, margins_test, y_train, y_test, train_ids, test_ids, classes.
    fz: Feldman & Zhang's runs (aux_arrays.npz). lira: keep.npy, logits, scores. datamodels:
    masks.npy, train_margins.npy, or train_masks_50pct.npy and its like. fz-scores:
    *_infl_matrix.npz, *_index.npz with *_high_infl_pairs_*.npz beside it, or with --data the latter
    alone. c-scores: labels and scores.

    Example: raymem import npz fleet.npz runs/imported
    """
    from raymem.interop import import_fleet, import_scores
    from raymem.scores import score

    with command_errors(debug):
        examples = load_examples(data) if data else None
        if format not in SCORES:
            made = import_fleet(format, path, store, data=examples, trials=trials, **order)
            click.echo(summary_text(score(made)))
            return
        if any(order.values()) or trials:
            raise ImportFileError(
                "published scores have their own labels and names, and no trials: give --data only"
            )
        made = import_scores(path, store, data=examples)
        scores = made.scores()
        nothing = pc.and_(pc.is_null(scores["memorization"]), pc.is_null(scores["accuracy_out"]))
        known = scores.num_rows - pc.sum(nothing).as_py()
        click.echo(f"{known:,} scores, {made.scores('influence').num_rows:,} pairs")


@main.command("export")
@click.argument("format", type=click.Choice(list(EXPORTS)))
@click.argument("store")
@click.argument("path")
@click.option(
    "--epsilon",
    type=float,
    default=math.inf,
    help="Privacy budget of the trials; inf is not private.",
)
@click.option(
    "--pictures/--no-pictures",
    default=True,
    help="With hf: publish pictures of the most memorized examples too; they are training data.",
    show_default=True,
)
@debug_option
def export_command(
    format: str, store: str, path: str, epsilon: float, pictures: bool, debug: bool
) -> None:
    """Write a store in the format of other code.

    npz: the fleet's arrays. fz: Feldman & Zhang's runs, scores and pairs. lira: keep.npy,
    scores.npy, correct.npy. csv: the tables. hf: the Parquet and a card for Hugging Face, with the
    figures and pictures that `raymem report` made.

    Example: raymem export csv runs/feldman_digits digits-csv
    """
    with command_errors(debug):
        made = export(format, store, path, epsilon=epsilon, pictures=pictures)
        click.echo(f"written: {made}")


@setting_options(IngestOptions())
@main.command("ingest")
@click.argument("data")
@click.argument("cache")
@debug_option
def ingest_command(data: str, cache: str, debug: bool, **values: object) -> None:
    """Decode a large image set once, into a cache that studies take as --data.

    DATA: folders train/CLASS and val, WebDataset tars, or Parquet as on Hugging Face; CACHE: a
    folder or URL. Run the same command again to continue where it stopped.

    Example: raymem ingest /data/imagenet /data/imagenet-64 --size 64 --on-bad quarantine
    """
    from raymem.data.shards import ingest

    with command_errors(debug):
        options = filled(IngestOptions(), values)
        click.echo(ingest_text(ingest(data, cache, **vars(options))))
