"""The three links for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raymem.encoding import at_epsilon, duration
from raymem.links import (
    TARGET,
    Audit,
    Correlation,
    Costs,
    Finding,
    LabelErrors,
    Link2,
    Links,
    PaperBins,
    has_curvature,
    red,
)
from raymem.show.result_tables import (
    bins_table,
    correlations_table,
    curvature_by_epsilon_table,
    equal_loss_table,
    fits_table,
    label_errors_table,
    memorization_by_epsilon_table,
    one_model_table,
    rankings_table,
)
from raymem.show.table import format_table
from raymem.store.measures import title_of


def links_text(links: Links) -> str:
    """Everything about the three links: tables for each epsilon, then the verdicts."""
    parts = [
        correlations_text(links.correlations),
        *(format_table(bins_table(epsilon, bins)) for epsilon, bins in links.bins.items()),
        f"{paper_bins_text(links.paper)}\n{costs_text(links.costs)}".strip(),
        *(format_table(one_model_table(e, rows)) for e, rows in links.one_model.items()),
    ]
    if links.private_store is not None:
        parts.append(f"Links 2 and 3 are those of {links.private_store}")
    if len(links.memorization) > 1 or any(audit.mechanism for audit in links.memorization):
        parts += [link2_text(links.curvature), link3_text(links.memorization)]
    if any(parts):
        parts.append("\n".join(map(str, links.verdicts)))
    for found in (links.diagnostics, links.private_diagnostics):
        parts += [red_text(found)] if red(found) else []
    nothing = "no links: the study measures no curvature, and is not private"
    return "\n\n".join([part for part in parts if part] or [nothing])


def label_errors_text(found: LabelErrors, n: int) -> str:
    """Probable label errors, and how well rankings find those that were planted."""
    parts = [format_table(label_errors_table(found, n))]
    if not found.rows:
        parts = [f"{label_errors_table(found, n).title}"]
    if found.planted:
        parts.append(format_table(rankings_table(found)))
    return "\n".join(parts)


def red_text(found: Mapping[float, Sequence[Finding]]) -> str:
    """The findings that speak against trusting a run."""
    lines = [
        f"RED{at_epsilon(epsilon)}: {finding.name}: {finding.text} (should be {finding.limit})"
        for epsilon, finding in red(found)
    ]
    return "\n".join(lines)


def link2_text(link: Link2) -> str:
    """Link 2: mean curvature at each epsilon, fits, warnings."""
    return "\n".join([format_table(curvature_by_epsilon_table(link)), *link2_lines(link)])


def link2_lines(link: Link2) -> list[str]:
    """What was fitted to curvature over epsilon, and warnings."""
    lines = []
    if link.shape is not None:
        which = "all epsilons" if link.clipped_at_inf else "finite epsilons"
        lines.append(
            f"fitted to {which}: L(eps) = a + b e^(-c eps), curvature = slope L(eps)(1 - e^-eps) "
            "+ c2, with 95% intervals over trials"
        )
        lines += [f"  {name:5} {fitted.format()}" for name, fitted in link.parameters.items()]
        lines += [
            f"  slope of the curvature of examples {arm} of the subset: {fitted.format()}"
            for arm, fitted in link.slope_by_arm.items()
        ]
        lines.append(
            "  (slope stands where the theorem has m + 1, and is not m + 1: only the shape is "
            "tested)"
        )
    if link.fits:
        lines.append("error at epsilons left out of the fit, by law: " + ", ".join(
            f"{fit.law} {fit.loo_rmse:.3g} (AICc {fit.aicc:.3g})" for fit in link.fits
        ))  # fmt: skip
    lines += [f"NOTE: {warning}" for warning in link.warnings]
    return lines


def link3_text(audits: Sequence[Audit]) -> str:
    """Link 3: mean memorization at each epsilon, bounds, what the data certify."""
    if not audits:
        return "Memorization and epsilon: nothing is trained yet"
    return format_table(memorization_by_epsilon_table(audits))


def correlations_text(found: Mapping[float, Sequence[Correlation]]) -> str:
    """Memorization against curvature and its baselines, tables for each epsilon."""
    parts = []
    for epsilon, rows in found.items():
        at = at_epsilon(epsilon)
        if not rows:
            parts.append(f"Nothing to compare memorization with{at}")
            continue
        what, than = "Memorization and what a fleet gives beside it", ""
        if has_curvature(rows):
            what = "Link 1, memorization and curvature"
            than = "; loss, 1 - p and gradient are what curvature is compared with"
        equal = equal_loss_table(rows)
        parts += [
            f"{what} over {rows[0].examples:,} training examples{at} (95% bootstrap intervals over "
            f"{_over(rows)}{than}):\n{format_table(correlations_table(rows))}",
            format_table(fits_table(rows)),
            *([] if equal is None else [format_table(equal)]),
        ]
    return "\n\n".join(parts)


def _over(rows: Sequence[Correlation]) -> str:
    """What the bootstrap's intervals are over."""
    if all(row.folds <= 1 for row in rows):
        return "examples only: one block"
    once = [row.measure for row in rows if row.folds <= 1]
    but = f"; of {', '.join(map(title_of, once))} over one block's trials only" if once else ""
    return f"blocks of trials and examples{but}"


def costs_text(found: Mapping[float, Costs]) -> str:
    """What memorization and curvature took, a line for each epsilon."""
    lines = []
    for epsilon, c in found.items():
        at = at_epsilon(epsilon)
        lines.append(
            f"cost{at}: memorization from {c.trials:,} models {duration(c.training_seconds)} "
            f"(reliability {_number(c.memorization_reliability) or 'not known'}); curvature under "
            f"{c.models_measured:,} of them {duration(c.curvature_seconds)} more (reliability "
            f"{_number(c.curvature_reliability) or 'not known'}). Curvature costs "
            f"{_share(c.ratio)} of memorization with the training of its models, "
            f"{_share(c.ratio_without_training)} without; both at reliability 0.9: "
            f"{_share(c.ratio_at_target)}"
        )
        if c.epochs_seconds:
            lines.append(
                f"averaged over training{at}: {duration(c.epochs_seconds)} more than that "
                f"(reliability {_number(c.epochs_reliability) or 'not known'}); "
                f"{_share(c.epochs_ratio)} of memorization with the training of its models, both "
                f"at reliability {TARGET:g}: {_share(c.epochs_ratio_at_target)}"
            )
    return "\n".join(lines)


def paper_bins_text(found: Mapping[float, Sequence[PaperBins]]) -> str:
    """The paper's fits through 50 bins, a line for each."""
    lines = []
    for epsilon, rows in found.items():
        at = at_epsilon(epsilon)
        for bins in rows:
            if bins.straight is None:
                continue
            lines.append(
                f"in the paper's bins{at}: {title_of(bins.measure)} = "
                f"{bins.straight.slope:.3g} mem + "
                f"{bins.straight.intercept:.3g} (R^2 {bins.straight.r_squared:.2f} over "
                f"{len(bins.mean)} bins{_second_fits(bins)}{_of_the_other_half(bins)})"
            )
    return "\n".join(lines)


def _second_fits(bins: PaperBins) -> str:
    """R^2 of the paper's second fit in its three forms, n being the examples of a bin."""
    fits = {
        "mem/sqrt(n), eq. 15": bins.equation_15,
        "mem*sqrt(n), the ImageNet notebook": bins.imagenet_notebook,
        "mem*sqrt(n) and n, the CIFAR-100 notebook": bins.cifar100_notebook,
    }
    shown = [f"{fit.r_squared:.2f} on {name}" for name, fit in fits.items() if fit is not None]
    return f"; {', '.join(shown)}" if shown else ""


def _of_the_other_half(bins: PaperBins) -> str:
    line = None if bins.crossed is None else bins.crossed.line
    return "" if line is None else f"; binned by one half of the trials, slope {line.slope:.3g}"


def _share(ratio: float) -> str:
    """The price of curvature, from how many times cheaper it is."""
    return "?" if math.isnan(ratio) else f"{1 / ratio:.3g}x"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
