"""Results as tables: what each result shows, declared once for the terminal, the page and JSON.

In:  results of `raymem.links` and `raymem.scores`, rows of score tables. Out: `Table`s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from raymem.encoding import at_epsilon, epsilon_name
from raymem.experiments import ARMS
from raymem.links import (
    METHODS,
    NOT_A_TEST,
    Audit,
    Correlation,
    Finding,
    LabelErrors,
    Link2,
    Memorized,
    OneModel,
    RemovalEffect,
    Removed,
)
from raymem.scores import Attack, Attacked
from raymem.show.score_tables import column_of, memorization_of
from raymem.show.table import EPSILON, Cell, Column, Estimate, Ranged, Table, percent
from raymem.store.measures import title_of, unit_of

REFERENCES_TITLE = "Membership inference with fewer reference trials"
REFERENCES_NOTE = (
    "Each example has the same number of reference trials, the column 'in' of which trained on it. "
    "LiRA has one variance for each arm below 32 in each; offline attacks use only those that did "
    "not train on it."
)
_BOUNDS = (
    ("paper", "bound 1-e^-eps"),
    ("fixed-size", "bound, fixed size"),
    ("sharp", "sharp bound"),
    ("total-variation", "TV bound"),
)
_RATES = (
    Column(key="auc", title="AUC", digits=".4f"),
    Column(key="balanced_accuracy", title="best balanced accuracy", digits=".4f"),
    Column(key="tpr_at_low_fpr", title="TPR at FPR 0.1%", digits=".5f"),
    Column(key="tpr_at_fpr", title="TPR at FPR 1%", digits=".4f"),
)


def label_errors_table(found: LabelErrors, n: int) -> Table:
    """The n most suspicious labels."""
    known = found.rows[0] if found.rows else {}
    wanted = ("example_id", "class", "loss_out", "accuracy_out", "accuracy_in")
    names = [name for name in wanted if name in known]
    return Table(
        title=f"{len(found.rows):,} probable label errors: models trained without them give their "
        "label less than 10%; the largest loss of these models first",
        columns=[
            *map(column_of, names),
            Column(key="memorization", title="memorization [95%]"),
        ],
        rows=[[*(row[name] for name in names), memorization_of(row)] for row in found.rows[:n]],
    )


def rankings_table(found: LabelErrors) -> Table:
    """How well rankings of all examples find the labels that were flipped on purpose."""
    return Table(
        title=f"{found.planted:,} labels were flipped on purpose: {percent(found.precision)} of "
        f"this list are, {percent(found.recall)} of them are on it. Rankings of all examples",
        columns=[
            Column(key="measure", title="ranked by"),
            Column(key="precision", title=f"precision in {found.planted:,}"),
            Column(key="average_precision", title="average precision"),
        ],
        rows=[
            [title_of(r.column), percent(r.precision), r.average_precision] for r in found.rankings
        ],
    )


# Link 1.


def correlations_table(rows: Sequence[Correlation]) -> Table:
    """Memorization against every measure, the highest rank correlation first."""
    columns = [
        Column(key="measure", title="measure"),
        Column(key="spearman", title="rank correlation", digits=".2f"),
        Column(key="among_memorized", title="among memorization > 0", digits=".2f"),
        Column(key="auc", title="AUC of memorization > 0.25", digits=".3f"),
        Column(key="pearson", title="Pearson", digits=".2f"),
        Column(key="pearson_disattenuated", title="disattenuated", digits=".2f"),
        Column(key="ceiling", title="at most", digits=".2f"),
    ]
    ranked = sorted(rows, key=lambda row: -_known(row.spearman.value))
    return Table(
        columns=columns,
        rows=[
            [
                title_of(row.measure),
                Estimate.of(row.spearman),
                Estimate.of(row.among_memorized),
                Estimate.of(row.auc),
                Estimate.of(row.pearson),
                row.pearson_disattenuated,
                row.ceiling,
            ]
            for row in ranked
        ],
        notes=[ties_note(rows[0])] if rows else [],
    )


def _known(value: float) -> float:
    return -2.0 if math.isnan(value) else value


def ties_note(row: Correlation) -> str:
    """What ties and noise do to the coefficients of a table."""
    return (
        f"{percent(row.tied)} of the examples have memorization {row.tied_at:.2g}; with such ties "
        "Spearman's correlation cannot exceed the value under 'at most'. The intervals cover the "
        "correlation that this many trials give on average, which noise attenuates; "
        "'disattenuated' estimates Pearson's correlation without that noise, and has no interval."
    )


def fits_table(rows: Sequence[Correlation]) -> Table:
    """The theorem's line through the examples, and cosines."""
    return Table(
        title="Line through the examples (measure = slope x memorization + intercept), and cosines",
        columns=[
            Column(key="measure", title="measure"),
            Column(key="slope", title="slope", digits=".3g"),
            Column(key="c1", title="c1"),
            Column(key="violating", title="bound violated"),
            Column(key="cosine", title="cosine"),
            Column(key="cosine_null", title="cosine, shuffled"),
        ],
        rows=[
            [
                title_of(row.measure),
                Estimate(row.slope, row.slope_low, row.slope_high),
                row.c1,
                percent(row.violating),
                row.cosine.value,
                row.cosine_null,
            ]
            for row in rows
        ],
    )


def equal_loss_table(rows: Sequence[Correlation]) -> Table | None:
    """Curvature and memorization at equal loss, by method; None if it was not measured."""
    found = [(row, row.at_equal_loss) for row in rows if row.at_equal_loss is not None]
    if not found:
        return None
    return Table(
        title="Rank correlation of memorization and curvature at equal loss",
        columns=[
            Column(key="measure", title="measure"),
            Column(key="all", title="all examples"),
            *(Column(key=method, title=method.replace("_", " ")) for method in METHODS),
        ],
        rows=[[title_of(row.measure), row.spearman.value, *at.values] for row, at in found],
        notes=[NOT_A_TEST],
    )


def bins_table(epsilon: float, bins: pa.Table) -> Table:
    """Means over models trained without the examples, by memorization."""
    names = [name for name in bins.column_names if name.endswith("_out")]
    return Table(
        title=f"Means by memorization{at_epsilon(epsilon)}, models trained without the examples",
        columns=[
            Column(key="memorization", title="memorization"),
            Column(key="examples", title="examples"),
            *(column_of(name, ".3g") for name in names),
        ],
        rows=[
            [f"{row['from']:.1f} to {row['to']:.1f}", row["examples"], *(row[n] for n in names)]
            for row in bins.to_pylist()
        ],
    )


def one_model_table(epsilon: float, rows: Sequence[OneModel]) -> Table:
    """What one model by itself says of memorization."""
    models = rows[0].models if rows else 0
    return Table(
        title=f"Memorization against measures of one model on its own subset{at_epsilon(epsilon)}, "
        f"mean over {models:,} models",
        columns=[
            Column(key="measure", title="measure of one model"),
            Column(key="spearman", title="rank correlation (least to greatest)"),
            Column(key="pearson", title="Pearson"),
            Column(key="agreement", title="agreement of two models"),
            Column(key="seconds", title="per model", unit="seconds", digits=".3g"),
        ],
        rows=[
            [
                title_of(f"{row.measure}_in").removesuffix(", in"),
                f"{row.spearman:.3f} ({row.spearman_low:.3f} to {row.spearman_high:.3f})",
                row.pearson,
                row.agreement,
                row.seconds,
            ]
            for row in rows
        ],
    )


# Links 2 and 3.


def curvature_by_epsilon_table(link: Link2) -> Table:
    """Mean loss and curvature at each epsilon."""
    arms = {
        "curvature": "curvature, all examples",
        "curvature_in": "curvature, in the subset",
        "curvature_out": "curvature, out of it",
    }
    measured = [n for n in arms if any(getattr(o, n) is not None for o in link.observed)]
    return Table(
        title="Link 2, curvature and epsilon: means over training examples and the trials that all "
        "epsilons have (+- standard error over trials)",
        columns=[
            EPSILON,
            Column(key="trials", title="models"),
            *(
                Column(key=name, title=arms[name], unit=unit_of("curvature_out"), digits=".4g")
                for name in measured
            ),
            Column(key="loss", title="loss", unit=unit_of("loss_out"), digits=".4g"),
        ],
        rows=[
            [
                epsilon_name(o.epsilon),
                o.trials,
                *(_plus_minus(getattr(o, n), getattr(o, f"{n}_stderr")) for n in measured),
                _plus_minus(o.loss, o.loss_stderr),
            ]
            for o in link.observed
        ],
    )


def _plus_minus(value: float | None, stderr: float | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value, stderr=math.nan if stderr is None else stderr)


def memorization_by_epsilon_table(audits: Sequence[Audit]) -> Table:
    """Mean memorization at each epsilon, upper bounds, and what the audits certify."""
    of_each = [{check.bound.name: check for check in audit.bounds} for audit in audits]
    names = [(name, title) for name, title in _BOUNDS if any(name in found for found in of_each)]
    if all("sharp" in found or "fixed-size" not in found for found in of_each):
        names = [(name, title) for name, title in names if name != "fixed-size"]
    pool = next((audit.pool for audit in audits if audit.pool is not None), None)
    over = "" if pool is None else f" of {pool.examples:,} examples ({pool.what})"
    return Table(
        title=f"Link 3, memorization and epsilon: mean{over} with its 95% interval over runs, and "
        "upper bounds",
        columns=[
            EPSILON,
            Column(key="trials", title="models"),
            Column(key="pool", title="mean memorization"),
            *(Column(key=name, title=title) for name, title in names),
            Column(key="violations", title="examples above a bound"),
            Column(key="certified", title="certified epsilon"),
            Column(key="told_apart", title="told apart", digits=".1%"),
            Column(key="allowed", title="claim allows"),
            Column(key="refuted_from", title="refuted from"),
        ],
        rows=[
            [
                epsilon_name(audit.epsilon),
                audit.trials,
                Estimate.of(audit.pool),
                *(_bound(found.get(name)) for name, _ in names),
                sum(check.violations for check in audit.bounds if check.bound.holds),
                _certified(audit),
                _told_apart(audit),
                _percent_of_pairs(audit, "allowed"),
                _percent_of_pairs(audit, "refuted_from"),
            ]
            for audit, found in zip(audits, of_each, strict=True)
        ],
        notes=[
            "Bounds: - is vacuous (1 or more). Certified epsilon: what the most telling candidate "
            "certifies, of what an error-free attack could. Told apart: of two trials, how often "
            "the one that trained on a candidate is told (95% over pairs of trials), the most that "
            "the claim allows, and what would refute it.",
            f"{_about_audits(audits[-1])}.",
        ]
        if audits
        else [],
    )


def memorized_by_epsilon_table(found: Sequence[Memorized]) -> Table:
    """Mean memorization of the memorized examples and of all others at each epsilon."""
    return Table(
        title="Mean memorization of the examples that are memorized without privacy, and of the "
        "others (95% intervals over runs)",
        columns=[
            EPSILON,
            Column(key="memorized", title=f"the {found[0].memorized.examples:,} memorized"),
            Column(key="others", title=f"the {found[0].others.examples:,} others"),
        ],
        rows=[
            [epsilon_name(at.epsilon), Estimate.of(at.memorized), Estimate.of(at.others)]
            for at in found
        ],
    )


def _about_audits(audit: Audit) -> str:
    at = f"Audits at epsilon {epsilon_name(audit.epsilon)}"
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


def _told_apart(audit: Audit) -> Estimate | None:
    found = audit.pairs
    return None if found is None else Estimate(found.accuracy, found.low, found.high)


def _percent_of_pairs(audit: Audit, name: str) -> str:
    value = None if audit.pairs is None else getattr(audit.pairs, name)
    if value is None:
        return ""
    return "-" if value > 1 else f"{value:.1%}"


def _bound(check: Any) -> Cell:
    if check is None:
        return None
    return "-" if check.bound.vacuous else float(check.bound.value)


# Whether to trust a run.


def findings_table(findings: Sequence[Finding]) -> Table:
    """The diagnostics of one epsilon."""
    return Table(
        columns=[
            Column(key="name", title="what"),
            Column(key="text", title="found"),
            Column(key="limit", title="should be"),
        ],
        rows=[[f.name, f.text, f"{f.limit} (red)" if f.red else f.limit] for f in findings],
    )


# Membership inference.


def attacks_table(attacked: Sequence[Attacked]) -> Table:
    """A row for each epsilon and attack."""
    return Table(
        title="Membership inference (LiRA, Carlini et al. 2022; RMIA, Zarifzadeh et al. 2024): "
        "scored trials as targets, attacked with the trials whose subsets are independent of "
        "theirs (+- standard error over targets)",
        columns=[
            EPSILON,
            Column(key="trials", title="trials"),
            Column(key="targets", title="targets"),
            Column(key="attack", title="attack"),
            *_RATES,
        ],
        rows=[
            [epsilon_name(a.epsilon), a.trials, a.targets, one.name, *_rates(one)]
            for a in attacked
            for one in a.attacks
        ],
    )


def references_table(attacked: Sequence[Attacked]) -> Table:
    """A row for each epsilon, number of reference trials and attack."""
    return Table(
        title=REFERENCES_TITLE,
        columns=[
            EPSILON,
            Column(key="references", title="references"),
            Column(key="references_in", title="in"),
            Column(key="examples", title="examples"),
            Column(key="attack", title="attack"),
            *_RATES,
        ],
        rows=[
            [epsilon_name(a.epsilon), k.references, k.references_in, k.examples, one.name,
             *_rates(one)]
            for a in attacked
            for k in a.by_references
            for one in k.attacks
        ],
        notes=[REFERENCES_NOTE],
    )  # fmt: skip


def _rates(one: Attack) -> list[Cell]:
    rates = [getattr(one, column.key) for column in _RATES]
    return [Estimate(rate.value, stderr=rate.stderr) for rate in rates]


def vulnerable_table(here: Attacked) -> Table:
    """The most vulnerable training examples at one epsilon."""
    names = list(here.most_vulnerable[0]) if here.most_vulnerable else []
    return Table(
        title=f"The {len(here.most_vulnerable)} most vulnerable training examples"
        f"{at_epsilon(here.epsilon)} (d': how many standard deviations their margins are apart, "
        "in and out)",
        columns=[Column(key=name, title=title_of(name)) for name in names],
        rows=[list(row.values()) for row in here.most_vulnerable],
    )


# Removal.


def removal_table(found: Removed, effect: RemovalEffect) -> Table:
    """Test accuracy by number of removed examples, and how much lower that without the most
    memorized is."""
    sizes = effect.sizes
    columns: list[list[Cell]] = [
        [0, *sizes],
        [None, *(found.least_memorization(size) for size in sizes)],
    ]
    for arm in ARMS:
        columns.append([*map(_points, (effect.accuracy_all, *effect.accuracy[arm]))])
    for contrast in effect.contrasts:
        columns.append([None, *map(_points, contrast.at_size)])
    return Table(
        title=f"Test accuracy without k training examples, over {effect.repeats} repeats (percent, "
        "95% intervals)",
        columns=[
            Column(key="removed", title="removed"),
            Column(key="least_memorization", title="memorization from"),
            *(Column(key=f"without {arm}", title=f"without {arm}", digits=".2f") for arm in ARMS),
            *(
                Column(key=f"below {c.control}", title=f"below {c.control}", digits=".2f")
                for c in effect.contrasts
            ),
        ],
        rows=list(zip(*columns, strict=True)),
    )


def _points(mean: Ranged) -> Estimate:
    return Estimate(100 * mean.value, 100 * mean.low, 100 * mean.high)
