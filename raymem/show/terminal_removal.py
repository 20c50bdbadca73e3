"""A removal experiment for a terminal, and its files: removal.json, figures/removal.*."""

from __future__ import annotations

from raymem.links import Removed
from raymem.show.figures import removal_figure
from raymem.show.result_tables import removal_table
from raymem.show.table import format_table
from raymem.store import Store


def removal_text(found: Removed) -> str:
    """The table, what it was measured on, and the verdict."""
    effect, removal = found.headline, found.removal
    lines = [
        format_table(removal_table(found, effect)),
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
    store.write_note("removal", found)
    removal_figure(found).keep(store, dark=True)
    return store.files.path("removal.json")


def _copies(found: Removed) -> str:
    if found.apart is None:
        return "all of them have a near duplicate in the training set, so none is left out"
    if not found.copies:
        return "none has a near duplicate in the training set"
    return f"{found.copies:,} more have a near duplicate in the training set and are left out"
