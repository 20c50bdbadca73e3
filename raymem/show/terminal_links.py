"""The three links for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from raymem.encoding import at_epsilon, epsilon_name
from raymem.fleet import duration
from raymem.links import (
    METHODS,
    NOT_A_TEST,
    TARGET,
    Audit,
    Correlation,
    Costs,
    Finding,
    LabelErrors,
    Link2,
    Links,
    OneModel,
    PaperBins,
    has_curvature,
    red,
)
from raymem.show.terminal_scores import as_text, percent

T = TypeVar("T")


def links_text(links: Links, *, brief: bool = False) -> str:
    """The three links of a store; `brief`: memorization's table at the largest epsilon only."""
    parts = []
    if links.correlations:
        shown = list(links.correlations)[-1:] if brief else list(links.correlations)
        parts += [
            correlations_text(_at_these(links.correlations, shown)),
            bins_text(_at_these(links.bins, shown)),
            f"{paper_bins_text(_at_these(links.paper, shown))}\n"
            f"{costs_text(_at_these(links.costs, shown))}".strip(),
            one_model_text(_at_these(links.one_model, shown)),
        ]
        if len(shown) < len(links.correlations):
            others = ", ".join(epsilon_name(e) for e in links.correlations if e not in shown)
            parts.append(f"The same at epsilon {others}: raymem links shows it")
    if links.private_store is not None:
        parts.append(f"Links 2 and 3 are those of {links.private_store}")
    if len(links.memorization) > 1 or any(audit.mechanism for audit in links.memorization):
        parts += [link2_text(links.curvature), link3_text(links.memorization)]
    if parts:
        parts.append("\n".join(map(str, links.verdicts)))
    for found in (links.diagnostics, links.private_diagnostics):
        parts += [red_text(found)] if red(found) else []
    nothing = "no links: the study measures no curvature, and is not private"
    return "\n\n".join([part for part in parts if part] or [nothing])


def label_errors_text(found: LabelErrors, n: int) -> str:
    """Probable label errors, and how well rankings find those that were planted."""
    rows = pa.Table.from_pylist(found.rows[:n])
    lines = [
        f"{len(found.rows):,} probable label errors: models without them give their label "
        "less than 10%; the largest loss of these models first",
        as_text(_rounded(rows)) if found.rows else "",
    ]
    if found.planted:
        lines.append(
            f"{found.planted:,} labels were flipped on purpose: {percent(found.precision)} of this "
            f"list are, {percent(found.recall)} of them are on it. Rankings of all examples:"
        )
        lines.append(
            as_text(
                pa.table(
                    {
                        "by": [r.column for r in found.rankings],
                        f"precision in {found.planted:,}": [
                            percent(r.precision) for r in found.rankings
                        ],
                        "average precision": [f"{r.average_precision:.3f}" for r in found.rankings],
                    }
                )
            )
        )
    return "\n".join(line for line in lines if line)


def _rounded(table: pa.Table) -> pa.Table:
    """Floats with three digits, as text."""
    columns = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        if pa.types.is_floating(table[name].type):
            values = ["" if value is None else f"{value:.3f}" for value in values]
        columns[name] = values
    return pa.table(columns)


def red_text(found: Mapping[float, Sequence[Finding]]) -> str:
    """The findings that speak against trusting a run."""
    lines = [
        f"RED{at_epsilon(epsilon)}: {finding.name}: {finding.text} (should be {finding.limit})"
        for epsilon, finding in red(found)
    ]
    return "\n".join(lines)


def _at_these(found: Mapping[float, T], epsilons: Sequence[float]) -> dict[float, T]:
    return {epsilon: found[epsilon] for epsilon in epsilons if epsilon in found}


def link2_text(link: Link2) -> str:
    """Curvature against epsilon: means, fits, doubts."""
    lines = [
        "Link 2, curvature and epsilon: means over training examples and the trials that all "
        f"epsilons have (+- standard error over trials):\n{as_text(_observed_table(link))}"
    ]
    if link.shape is not None:
        which = "all epsilons" if link.clipped_at_inf else "finite epsilons"
        lines.append(
            f"fitted to {which}: L(eps) = a + b e^(-c eps), curvature = slope L(eps)(1 - e^-eps) "
            "+ c2, with 95% intervals over trials"
        )
        lines += [f"  {name:5} {fitted.shown()}" for name, fitted in link.parameters.items()]
        lines += [
            f"  slope of the curvature of examples {arm} of the subset: {fitted.shown()}"
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
    return "\n".join(lines)


def _observed_table(link: Link2) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "epsilon": [epsilon_name(o.epsilon) for o in link.observed],
        "trials": [o.trials for o in link.observed],
        "mean loss": [_plus_minus(o.loss, o.loss_stderr) for o in link.observed],
    }
    for title, name in (
        ("mean curvature", "curvature"),
        ("in the subset", "curvature_in"),
        ("out of it", "curvature_out"),
    ):
        shown = [_plus_minus(getattr(o, name), getattr(o, f"{name}_stderr")) for o in link.observed]
        if any(shown) or name == "curvature":
            columns[title] = shown
    return pa.table(columns)


def link3_text(audits: Sequence[Audit]) -> str:
    """Memorization against epsilon: the pool's mean, bounds, what the data certify."""
    rows = []
    for audit in audits:
        bounds = {check.bound.name: check for check in audit.bounds}
        row = {
            "epsilon": epsilon_name(audit.epsilon),
            "trials": audit.trials,
            "mean memorization": ""
            if audit.pool is None
            else f"{audit.pool.value:.3f} [{audit.pool.low:.3f}, {audit.pool.high:.3f}]",
        }
        for name, title in (
            ("paper", "1-e^-eps"),
            ("fixed-size", "fixed size"),
            ("sharp", "sharp"),
            ("total-variation", "TV"),
        ):
            row[title] = _bound(bounds.get(name))
        row["above"] = sum(c.violations for c in audit.bounds if c.bound.holds)
        row["certified eps"] = _certified(audit)
        row["told apart"] = _told_apart(audit)
        row["claim allows"] = _percent_of_pairs(audit, "allowed")
        row["refuted from"] = _percent_of_pairs(audit, "refuted_from")
        rows.append(row)
    if not rows:
        return "Link 3: nothing is trained yet"
    if all(not row["fixed size"] or row["sharp"] for row in rows):
        rows = [{k: v for k, v in row.items() if k != "fixed size"} for row in rows]
    table = pa.Table.from_pylist(rows)
    pool = next((audit.pool for audit in audits if audit.pool is not None), None)
    over = "" if pool is None else f" of {pool.examples:,} examples ({pool.what})"
    return (
        f"Link 3, memorization and epsilon: mean{over} with its 95% interval over runs; upper "
        "bounds (- says nothing); examples above a bound that holds; the epsilon that the most "
        "telling candidate certifies, of what an error-free attack could; of two trials, how often "
        "the one that trained on a candidate is told (95% over pairs of trials), the most that the "
        f"claim allows, and what would refute it:\n{as_text(table)}\n{_about_audits(audits[-1])}"
    )


def _about_audits(audit: Audit) -> str:
    at = f"audits at epsilon {epsilon_name(audit.epsilon)}"
    singly, pairs = audit.candidates, audit.pairs
    if singly is None:
        return f"{at}: none, membership cannot be told ({audit.why_no_pairs})"
    text = f"{at}: {singly.examples:,} candidates ({singly.what}) one by one"
    if pairs is None:
        return f"{text}; the audit by pairs of trials {audit.why_no_pairs}"
    return (
        f"{text}; {pairs.right:,} of {pairs.runs * pairs.guesses:,} guesses right in "
        f"{pairs.runs} pairs of trials, which no mechanism of epsilon below {pairs.epsilon:.2f} "
        "gives (95%)"
    )


def _certified(audit: Audit) -> str:
    found = audit.candidates
    return "" if found is None else f"{found.certified:.2f} of {found.certifiable:.2f}"


def _told_apart(audit: Audit) -> str:
    found = audit.pairs
    if found is None:
        return ""
    return f"{found.accuracy:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _percent_of_pairs(audit: Audit, name: str) -> str:
    value = None if audit.pairs is None else getattr(audit.pairs, name)
    if value is None:
        return ""
    return "-" if value > 1 else f"{value:.1%}"


def _bound(check: Any) -> str:
    if check is None:
        return ""
    return "-" if check.bound.vacuous else f"{check.bound.value:.3f}"


def _plus_minus(value: float | None, stderr: float | None) -> str:
    if value is None:
        return ""
    more = "" if stderr is None or math.isnan(stderr) else f" +- {stderr:.2g}"
    return f"{value:.4g}{more}"


def correlations_text(found: Mapping[float, Sequence[Correlation]]) -> str:
    """Memorization against curvature and its baselines, a table for each epsilon."""
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
        parts.append(
            f"{what} over {rows[0].examples:,} training examples{at} (95% bootstrap intervals over "
            f"{_over(rows)}{than}):\n{as_text(_correlations_table(rows))}\n{ties_text(rows[0])}"
        )
        parts.append(equal_loss_text(rows))
    return "\n\n".join(part for part in parts if part)


def _correlations_table(rows: Sequence[Correlation]) -> pa.Table:
    return pa.table(
        {
            "memorization against": [row.measure for row in rows],
            "Spearman": [row.spearman.shown(3) for row in rows],
            "at most": [_number(row.ceiling) for row in rows],
            "among mem > 0": [row.among_memorized.shown(3) for row in rows],
            "AUC of mem > 0.25": [row.auc.shown(3) for row in rows],
            "Pearson": [row.pearson.shown(3) for row in rows],
            "disattenuated": [_number(row.pearson_disattenuated) for row in rows],
            "cosine (shuffled)": [
                f"{row.cosine.value:.3f} ({row.cosine_null:.3f})" for row in rows
            ],
            "slope": [f"{r.slope:.3g} [{r.slope_low:.3g}, {r.slope_high:.3g}]" for r in rows],
            "c1": [_number(row.c1) for row in rows],
            "bound violated": [percent(row.violating) for row in rows],
        }
    )


def ties_text(row: Correlation) -> str:
    """What ties and noise do to the coefficients of a table."""
    return (
        f"{percent(row.tied)} of the examples have memorization {row.tied_at:.2g}; with such ties "
        "Spearman's correlation cannot exceed the value under 'at most'. The intervals cover the "
        "correlation that this many trials give on average, which noise attenuates; "
        "'disattenuated' estimates Pearson's correlation without that noise, and has no interval."
    )


def equal_loss_text(rows: Sequence[Correlation]) -> str:
    """Curvature and memorization at equal loss; empty if it was not measured."""
    table = equal_loss_table(rows)
    if table is None:
        return ""
    return (
        f"Rank correlation of memorization and curvature at equal loss:\n{as_text(table)}\n"
        f"{NOT_A_TEST}"
    )


def equal_loss_table(rows: Sequence[Correlation]) -> pa.Table | None:
    """A row for each measure of curvature, a column for each method."""
    found = [(row.measure, row.spearman.value, row.at_equal_loss) for row in rows]
    shown = [
        (name, *map(_number, (rho, *equal.values)))
        for name, rho, equal in found
        if equal is not None
    ]
    if not shown:
        return None
    titles = ("memorization against", "all examples", *METHODS)
    return pa.table(dict(zip(titles, zip(*shown, strict=True), strict=True)))


def _over(rows: Sequence[Correlation]) -> str:
    """What the bootstrap's intervals are over."""
    if all(row.folds <= 1 for row in rows):
        return "examples only: one block"
    once = [row.measure for row in rows if row.folds <= 1]
    but = f"; of {', '.join(once)} over one block's trials only" if once else ""
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


def one_model_text(found: Mapping[float, Sequence[OneModel]]) -> str:
    """What one model by itself says of memorization, a table for each epsilon."""
    parts = []
    for epsilon, rows in found.items():
        table = pa.table(
            {
                "measure of one model": [row.measure for row in rows],
                "Spearman (least to greatest)": [
                    f"{row.spearman:.3f} ({row.spearman_low:.3f} to {row.spearman_high:.3f})"
                    for row in rows
                ],
                "Pearson": [_number(row.pearson) for row in rows],
                "agreement of two models": [_number(row.agreement) for row in rows],
                "seconds a model": [f"{row.seconds:.3g}" for row in rows],
            }
        )
        parts.append(
            f"Memorization against measures of one model on its own subset{at_epsilon(epsilon)}, "
            f"mean over {rows[0].models:,} models:\n{as_text(table)}"
        )
    return "\n\n".join(parts)


def paper_bins_text(found: Mapping[float, Sequence[PaperBins]]) -> str:
    """The paper's fits through 50 bins, a line for each."""
    lines = []
    for epsilon, rows in found.items():
        at = at_epsilon(epsilon)
        for bins in rows:
            if bins.straight is None:
                continue
            lines.append(
                f"in the paper's bins{at}: {bins.measure} = {bins.straight.slope:.3g} mem + "
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


def bins_text(found: Mapping[float, pa.Table]) -> str:
    """Curvature and its baselines over bins of memorization, a table for each epsilon."""
    parts = []
    for epsilon, bins in found.items():
        at = at_epsilon(epsilon)
        shown = pa.table(
            {
                "memorization": [
                    f"{low:.1f} to {high:.1f}"
                    for low, high in zip(
                        bins["from"].to_pylist(), bins["to"].to_pylist(), strict=True
                    )
                ],
                "examples": bins["examples"],
                **{
                    name: [_short(value) for value in bins[name].to_pylist()]
                    for name in bins.column_names
                    if name.endswith("_out")
                },
            }
        )
        parts.append(f"Means over out-models, by memorization{at}:\n{as_text(shown)}")
    return "\n\n".join(parts)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
