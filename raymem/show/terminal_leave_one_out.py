"""How far scores are from leaving one out: for a terminal, and leave_one_out.json, its figure."""

from __future__ import annotations

import pyarrow as pa

from raymem.links import Extrapolated, LeftOut, Mean
from raymem.show.figures import leave_one_out_figure
from raymem.show.table import format_table
from raymem.store import Store


def bias_table(found: LeftOut) -> pa.Table:
    """A row for each group of examples: mean memorization both ways, and the difference."""
    ratio = f"{found.experiment.scored_ratio:g}"
    return pa.table(
        {
            "examples": [bias.group for bias in found.biases],
            "number": [bias.examples for bias in found.biases],
            f"memorization at ratio {ratio}": [f"{bias.scored:.3f}" for bias in found.biases],
            "leaving one out": [f"{bias.left_out:.3f}" for bias in found.biases],
            "bias": [_interval(bias.bias) for bias in found.biases],
        }
    )


def example_table(found: LeftOut) -> pa.Table:
    """A row for each example, with 95% intervals."""
    rows = found.examples.to_pylist()
    return pa.table(
        {
            "example": [row["example_id"] for row in rows],
            "label": [row["label"] for row in rows],
            "chosen as": [row["group"] for row in rows],
            **{
                title: [
                    f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
                    for row in rows
                ]
                for title, name in (
                    (f"at ratio {found.experiment.scored_ratio:g}", "memorization"),
                    ("leaving one out", "leave_one_out"),
                )
            },
        }
    )


def leave_one_out_text(found: LeftOut) -> str:
    """The tables, what they were measured on, and the verdict."""
    of = found.experiment
    lines = [
        f"Memorization of {len(of.rows)} training examples, by leaving each out of the whole set "
        f"and by random subsets of ratio {of.scored_ratio:g} (95% intervals):",
        format_table(example_table(found)),
        "",
        "Bias, memorization at that ratio minus leaving one out:",
        format_table(bias_table(found)),
        "",
        sources_text(found),
    ]
    if found.incomplete:
        lines.append(f"NOTE: {found.incomplete} repeats lack trials and do not count")
    return "\n".join([*lines, "", str(found.verdict)])


def sources_text(found: LeftOut) -> str:
    """Which trials gave what."""
    of = found.experiment
    return (
        f"{found.repeats} repeats of {1 + len(of.rows)} trials; training accuracy "
        f"{100 * found.accuracy_train:.1f}%. Scores are of trials {of.scored_trials} of study "
        f"{of.scored_study[:16]}; the examples were chosen by its trials {of.chosen_by}. Rank "
        f"correlation {found.spearman.format(2) or 'not known'}, Pearson's "
        f"{found.pearson.format(2) or 'not known'}"
    )


def write_leave_one_out(found: LeftOut) -> str:
    """Write leave_one_out.json and figures/leave-one-out.png, -dark.png and .pdf; returns where the
    JSON is."""
    store = Store(found.url)
    store.write_note("leave_one_out", found)
    leave_one_out_figure(found).keep(store, dark=True)
    return store.files.path("leave_one_out.json")


def extrapolated_text(found: Extrapolated) -> str:
    """Both ratios against the extrapolated, and the verdict."""
    table = pa.table(
        {
            "subset ratio": [*(f"{at.ratio:g}" for at in found.ratios), "1 - 1/N, extrapolated"],
            "mean memorization": [
                f"{m:.4f}" for m in (*(a.mean for a in found.ratios), found.mean)
            ],
            "bias, all examples": [*(_interval(at.bias) for at in found.ratios), ""],
            f"bias, {found.memorized:,} above 0.25": [
                *(_interval(at.bias_memorized) for at in found.ratios),
                "",
            ],
            "rank correlation": [
                *(at.spearman.format(2) for at in found.ratios),
                f"{found.agreement:.2f} between halves",
            ],
        }
    )
    return (
        "Memorization at two subset ratios, extrapolated to leaving one out (95% intervals):\n"
        f"{format_table(table)}\n\n{found.verdict}"
    )


def _interval(mean: Mean) -> str:
    return f"{mean.value:+.4f} [{mean.low:+.4f}, {mean.high:+.4f}]"
