"""Commands that read one store, or compare several.

What takes seconds to import (scipy, figures) is imported by the commands that use it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
import pyarrow as pa
from pyarrow.csv import write_csv

from raymem.cli.base import command_errors, debug_option, main, row_options
from raymem.encoding import json_bytes
from raymem.errors import StoreError
from raymem.show import (
    Table,
    describe_store,
    example_text,
    examples_table,
    format_table,
    pairs_table,
    top,
    watch_status,
    where,
)
from raymem.show.study_status import StudyStatus
from raymem.show.table import fold
from raymem.store import Store, verify

if TYPE_CHECKING:
    from raymem.links import Correlation, Links

SHOWN_PROBLEMS = 20


@main.command("status")
@click.argument("store")
@click.option("--watch", is_flag=True, help="Show it again and again, until all trials are done.")
@click.option(
    "--every",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    metavar="SECONDS",
    help="With --watch: how often.",
)
@click.option(
    "--price", type=click.FloatRange(min=0), help="Price of a device-hour, in any currency."
)
@click.option("--tracebacks", is_flag=True, help="Show all causes of failures, with tracebacks.")
@click.option(
    "--stalled-after",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    help="Exit with 1, and say why, if trials are missing and none was committed for this long.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@debug_option
def status_command(
    store: str,
    watch: bool,
    every: float,
    price: float | None,
    tracebacks: bool,
    stalled_after: float | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Status of a study: trials done, running and failed; workers, rate, time left, cost so far.

    Failed attempts are grouped by cause, each with the end of its first traceback. With
    --stalled-after it is a check for a scheduler or a monitor.

    Example: raymem status runs/feldman_digits --watch
    """
    with command_errors(debug):
        opened = Store(store)
        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                watch_status(opened, every=every, price=price)
        elif as_json:
            click.echo(json.dumps(StudyStatus.read(opened, price=price).as_dict(), indent=1))
        elif stalled_after is None:
            click.echo(fold(describe_store(opened, price=price, tracebacks=tracebacks)))
        if stalled_after is not None:
            why = StudyStatus.read(opened).stalled(60 * stalled_after)
            click.echo(f"stalled: {why}" if why else "not stalled")
            sys.exit(1 if why else 0)


@main.command("removal")
@click.argument("store")
@debug_option
def removal_command(store: str, debug: bool) -> None:
    """Results of a removal experiment: accuracy without the most memorized examples.

    Example: raymem removal runs/removal_digits
    """
    from raymem.links import find_removal
    from raymem.show import removal_text

    with command_errors(debug):
        click.echo(fold(removal_text(find_removal(Store(store)))))


@main.command("leave-one-out")
@click.argument("store")
@debug_option
def leave_one_out_command(store: str, debug: bool) -> None:
    """Results of a leave-one-out experiment: how far scores are from memorization's definition.

    Example: raymem leave-one-out runs/leave_one_out_digits
    """
    from raymem.links import find_leave_one_out
    from raymem.show import leave_one_out_text

    with command_errors(debug):
        click.echo(fold(leave_one_out_text(find_leave_one_out(Store(store)))))


@main.command("scores")
@click.argument("store")
@click.option("--sort", default="memorization", help="Column to sort by, largest first.")
@click.option("--ascending", is_flag=True, help="Sort smallest first.")
@click.option(
    "--memorized", is_flag=True, help="Only memorization above 0.25, at 5% false discoveries."
)
@click.option(
    "--where",
    "conditions",
    help="Only rows for which this holds, such as 'label == 3 and memorization > 0.25'.",
)
@click.option(
    "--with", "model", help="Join the curvature scores in STORE/curvature/MODEL by example id."
)
@row_options
@debug_option
def scores_command(
    store: str,
    model: str | None,
    sort: str,
    ascending: bool,
    memorized: bool,
    conditions: str | None,
    n: int,
    everything: bool,
    csv: bool,
    debug: bool,
) -> None:
    """The score table; docs/columns.md says what its columns mean.

    Example: raymem scores runs/feldman_digits --where "label == 8" --sort memorization_soft
    """
    with command_errors(debug):
        opened = Store(store)
        table = opened.scores()
        if model:
            from raymem.scores import join_curvature

            table = join_curvature(opened, table, model)
        if memorized:
            table = where(table, "memorized == true")
        if conditions:
            table = where(table, conditions)
        found = table.num_rows
        table = top(table, sort, None if everything else n, ascending=ascending)
        _print(table, examples_table(table, *(["curvature"] if model else []), sort), csv)
        if memorized and table.num_rows < found and not csv:
            click.echo(f"{table.num_rows:,} of {found:,} rows; --top N or --all for more", err=True)


def _print(table: pa.Table, shown: Table, csv: bool) -> None:
    if csv:
        write_csv(table, sys.stdout.buffer)
    else:
        click.echo(format_table(shown))


@main.command("pairs")
@click.argument("store")
@click.option(
    "--min-influence", type=float, default=-1.0, help="Only pairs with at least this influence."
)
@click.option(
    "--min-memorization",
    type=float,
    help="Only pairs whose training example has at least this memorization.",
)
@click.option(
    "--strong", is_flag=True, help="Only pairs with influence above 0.15 and significant."
)
@click.option(
    "--where", "conditions", help="Only rows for which this holds, such as 'train_label == 3'."
)
@row_options
@debug_option
def pairs_command(
    store: str,
    min_influence: float,
    min_memorization: float | None,
    strong: bool,
    conditions: str | None,
    n: int,
    everything: bool,
    csv: bool,
    debug: bool,
) -> None:
    """Pairs by influence: how much a training example helps models get a test example right.

    A store has the strong pairs, and the most influential training examples of each test example.

    Example: raymem pairs runs/feldman_digits --min-influence 0.3
    """
    with command_errors(debug):
        asked = [f"influence >= {min_influence}"]
        if min_memorization is not None:
            asked.append(f"memorization >= {min_memorization}")
        if strong:
            asked.append("strong == true")
        if conditions:
            asked.append(conditions)
        table = where(Store(store).scores("influence"), " and ".join(asked))
        table = top(table, "influence", None if everything else n)
        _print(table, pairs_table(table), csv)


@main.command("example")
@click.argument("store")
@click.argument("example_id", metavar="ID")
@click.option("--top", "n", type=click.IntRange(1), default=10, help="Number of pairs to show.")
@debug_option
def example_command(store: str, example_id: str, n: int, debug: bool) -> None:
    """Everything known about one example, with its most influential pairs.

    Example: raymem example runs/feldman_digits digit-1553
    """
    with command_errors(debug):
        click.echo(fold(example_text(Store(store), example_id, n)))


@main.command("links")
@click.argument("stores", metavar="STORE...", nargs=-1, required=True)
@click.option(
    "--extrapolate",
    "extrapolated",
    is_flag=True,
    help="Only memorization of two stores with different subset ratios, extrapolated to leaving "
    "one out.",
)
@click.option("--csv", is_flag=True, help="With --extrapolate: print every example as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@debug_option
def links_command(
    stores: Sequence[str], extrapolated: bool, csv: bool, as_json: bool, debug: bool
) -> None:
    """The three links: between memorization and curvature, and of each with epsilon.

    For private trials: fits of curvature against epsilon, bounds on memorization, and an audit of
    the claimed epsilons. With several stores: the links of each, and memorization of the first
    against curvature of the others, joined by example id; all must have the same examples. With
    --extrapolate: how much memorization at a subset ratio differs from leaving one out.

    Example: raymem links runs/privacy_digits
    """
    from raymem.links import correlations_across, find_links, verdicts_on_link1
    from raymem.show import correlations_text, links_text

    with command_errors(debug):
        opened = [Store(store) for store in stores]
        if extrapolated:
            _extrapolate(opened, csv, as_json)
            return
        if len({store.url for store in opened}) < len(opened):
            raise StoreError("a store is given twice; give each once")
        across = {other.url: correlations_across(opened[0], other) for other in opened[1:]}
        found = {store.url: find_links(store) for store in opened}
        if as_json:
            click.echo(json_bytes(_all_links(found, across)), nl=False)
            return
        for url, links in found.items():
            if len(found) > 1:
                click.echo(f"\n{url}\n")
            click.echo(fold(links_text(links)))
        for url, rows in across.items():
            click.echo(fold(f"\n{opened[0].url} against {url}\n\n{correlations_text(rows)}\n"))
            click.echo(fold("\n".join(map(str, verdicts_on_link1(rows)))))


def _extrapolate(stores: Sequence[Store], csv: bool, as_json: bool) -> None:
    from raymem.links import extrapolate
    from raymem.show import extrapolated_text

    if len(stores) != 2:
        raise StoreError(
            f"--extrapolate takes two stores of the same examples and recipe with different subset "
            f"ratios, got {len(stores)}"
        )
    found = extrapolate(*stores)
    if csv:
        write_csv(found.examples, sys.stdout.buffer)
    else:
        click.echo(json_bytes(found).rstrip() if as_json else extrapolated_text(found))


def _all_links(
    found: Mapping[str, Links], across: Mapping[str, Mapping[float, Sequence[Correlation]]]
) -> object:
    from raymem.links import verdicts_on_link1

    if len(found) == 1:
        return next(iter(found.values()))
    return {
        "stores": found,
        "memorization_of_the_first_against": across,
        "verdicts_against": {url: verdicts_on_link1(rows) for url, rows in across.items()},
    }


@main.command("membership")
@click.argument("store")
@click.option("--targets", type=click.IntRange(1), default=20, help="Number of trials to attack.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@debug_option
def membership_command(store: str, targets: int, as_json: bool, debug: bool) -> None:
    """Membership inference: how well a trial's margins reveal its subset.

    Each target trial is attacked with the trials of other blocks (LiRA, Carlini et al. 2022; RMIA,
    Zarifzadeh et al. 2024; the margin minus its mean), with all of them and with only 2, 4, 8, ...
    of them, and with one threshold on the loss. Writes scores/membership.parquet, with the
    vulnerability of every training example, and membership.json, which the report shows.

    Example: raymem membership runs/feldman_digits
    """
    from raymem.scores import membership
    from raymem.show import membership_text

    with command_errors(debug):
        opened = Store(store)
        found = membership(opened, targets=targets)
        found.write(opened)
        if as_json:
            click.echo(json_bytes(found), nl=False)
        else:
            click.echo(fold(membership_text(found)))


@main.command("errors")
@click.argument("store")
@click.option("--top", "n", type=click.IntRange(1), default=20, help="Number of examples to show.")
@click.option(
    "--epsilon",
    type=float,
    default=math.inf,
    help="Privacy budget of the models; inf is not private.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print all of them as CSV.")
@debug_option
def errors_command(store: str, n: int, epsilon: float, as_csv: bool, debug: bool) -> None:
    """Probable label errors, for cleaning a data set.

    Lists the examples whose label gets a probability below 10% from models that did not train on
    them. If the study flipped labels on purpose (--flip-labels), also how many of those are found.
    Test examples are ranked by `raymem scores STORE --where "split == test" --sort loss_out`.

    Example: raymem errors runs/feldman_digits
    """
    from raymem.links import label_errors
    from raymem.show import label_errors_text

    with command_errors(debug):
        found = label_errors(Store(store), epsilon)
        if not found.known:
            raise StoreError(
                f"{store} has neither losses nor accuracies of models without the examples, which "
                "say what is probably wrong; take a store of a fleet"
            )
        if as_csv:
            write_csv(pa.Table.from_pylist(found.rows), sys.stdout.buffer)
        else:
            click.echo(fold(label_errors_text(found, n)))


@main.command("report")
@click.argument("store")
@click.option("--data", help="Data set with the images, if it is not where the study found it.")
@click.option("--private", help="Store of a private study of the same examples, for links 2 and 3.")
@click.option("--leave-one-out", help="Store of a leave-one-out experiment on these scores.")
@debug_option
def report_command(
    store: str, data: str | None, private: str | None, leave_one_out: str | None, debug: bool
) -> None:
    """Write the report: report.html in the store, with figures as PNG and PDF beside it.

    One file that opens from disk: what was run, whether to trust it, the links, the most memorized
    examples of each class with their pictures, probable label errors, a table.

    Example: raymem report runs/feldman_digits
    """
    from raymem.show import write_report

    with command_errors(debug):
        where = write_report(store, data, private=private, leave_one_out=leave_one_out)
        click.echo(f"report: {where}")


@main.command("verify")
@click.argument("store")
@click.option("--repair", is_flag=True, help="Move damaged objects to damaged/.")
@debug_option
def verify_command(store: str, repair: bool, debug: bool) -> None:
    """Read every object back and list what is damaged, missing or foreign.

    Exits with 1 if anything is damaged or foreign. After --repair, the next run of the job makes
    what was moved away again.

    Example: raymem verify runs/feldman_digits --repair
    """
    with command_errors(debug):
        opened = Store(store)
        problems = verify(opened, repair=repair)
        counts = Counter(problem.kind for problem in problems)
        for problem in [p for p in problems if p.kind != "missing"][:SHOWN_PROBLEMS]:
            moved = ", moved to damaged/" if repair and problem.kind == "damaged" else ""
            click.echo(f"{problem.kind}: {problem.key}: {problem.detail}{moved}")
        click.echo(
            f"{len(opened.done()):,} trials read back; {counts['damaged']} objects damaged, "
            f"{counts['foreign']} foreign, {counts['missing']} missing"
        )
        if counts["foreign"] or (counts["damaged"] and not repair):
            sys.exit(1)
