"""A removal experiment for a terminal, and its files: removal.json, figures/removal.*."""

from __future__ import annotations

import pyarrow as pa

from raymem.experiments import ARMS
from raymem.links import Mean, RemovalEffect, Removed
from raymem.show.figures import removal_figure
from raymem.show.terminal_scores import as_text
from raymem.store import Store


def removal_table(found: Removed, effect: RemovalEffect) -> pa.Table:
    """A row for each size: accuracies and how much lower that of the most memorized is, in percent,
    with 95% intervals.
    """
    sizes = effect.sizes
    return pa.table(
        {
            "removed": pa.array([0, *sizes]),
            "memorization from": pa.array(
                [None, *(found.least_memorization(size) for size in sizes)], pa.float64()
            ),
            **{
                f"without {arm}": [_percent(mean) for mean in (effect.accuracy_all, *means)]
                for arm, means in ((arm, effect.accuracy[arm]) for arm in ARMS)
            },
            **{
                f"below {contrast.control}": ["", *map(_percent, contrast.at_size)]
                for contrast in effect.contrasts
            },
        }
    )


def removal_text(found: Removed) -> str:
    """The table, what it was measured on, and the verdict."""
    effect, removal = found.headline, found.removal
    lines = [
        f"Test accuracy without k training examples, in percent, over {effect.repeats} repeats "
        "(95% intervals):",
        as_text(removal_table(found, effect)),
        "",
        f"measured on {effect.test_examples:,} test examples; {_copies(found)}",
        f"ranked by the memorization of other trials, {removal.scored_trials} of study "
        f"{removal.scored_study[:16]}",
    ]
    if found.apart is not None and found.copies:
        lines.append(
            f"on all {found.all_test.test_examples:,} test examples: p = "
            f"{found.all_test.p_value:.2g}, "
            + ", ".join(
                f"{100 * c.slope.value:.4f} points per example against {c.control}"
                for c in found.all_test.contrasts
            )
        )
    lines += [
        f"standard error over other test examples, against {c.control}: "
        f"{100 * c.stderr_test:.4f} points per example"
        for c in effect.contrasts
    ]
    if found.incomplete:
        lines.append(f"NOTE: {found.incomplete} repeats lack trials and do not count")
    return "\n".join([*lines, "", str(found.verdict)])


def write_removal(found: Removed) -> str:
    """Write removal.json and figures/removal.png, -dark.png and .pdf; returns where the JSON is."""
    store = Store(found.url)
    store.write_note("removal", found.as_dict())
    figure = removal_figure(found)
    store.files.replace(f"figures/{figure.name}.png", figure.light)
    store.files.replace(f"figures/{figure.name}-dark.png", figure.dark)
    store.files.replace(f"figures/{figure.name}.pdf", figure.pdf)
    return store.files.path("removal.json")


def _copies(found: Removed) -> str:
    if found.apart is None:
        return "all of them have a near duplicate in the training set, so none is left out"
    if not found.copies:
        return "none has a near duplicate in the training set"
    return f"{found.copies:,} more have a near duplicate in the training set and are left out"


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.2f} [{100 * mean.low:.2f}, {100 * mean.high:.2f}]"
