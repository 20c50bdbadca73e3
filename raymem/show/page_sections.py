"""Sections of the page: every number that a fleet gives compared with memorization; membership
inference, if `raymem membership` was run; how far scores are from leaving one out, if that was."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pyarrow as pa

from raymem.encoding import at_epsilon, epsilon_name
from raymem.links import NOT_A_TEST, Coefficient, Correlation, LeftOut
from raymem.scores import Attacked
from raymem.show.terminal_leave_one_out import bias_table, example_table, sources_text
from raymem.show.terminal_links import equal_loss_table, ties_text
from raymem.show.terminal_membership import (
    REFERENCES_HEAD,
    attacks_table,
    best_text,
    correlation_text,
    references_table,
    shown,
)

TITLES = (
    "measure", "what it is", "rank correlation", "at most", "among memorization > 0",
    "AUC of memorization > 0.25", "Pearson, disattenuated", "examples",
)  # fmt: skip
# What each measure is; the larger, the more memorization is expected.
MEANINGS = {
    "curvature_out": "input loss curvature under models that did not see the example",
    "curvature_in": "input loss curvature under models that did",
    "curvature_over_training_out": "its mean over training (Garg et al. 2024), models that did not",
    "curvature_over_training_in": "its mean over training, models that did",
    "curvature_paper_out": "the paper's finite difference, models that did not see it",
    "curvature_paper_in": "the paper's finite difference, models that did",
    "loss_out": "loss of models that did not see it",
    "loss_in": "loss of models that did",
    "p_wrong_out": "1 - probability of its label, models that did not see it",
    "p_wrong_in": "1 - probability of its label, models that did",
    "gradient_norm_out": "length of the loss gradient in the pixels, models that did not see it",
    "gradient_norm_in": "length of the loss gradient in the pixels, models that did",
    "cumulative_loss": "training loss summed over the epochs",
    "learning_epoch": "epoch from which on training got it right for good",
    "forgetting_count": "times training got it wrong after it had been right",
    "wrong_out": "1 - accuracy of models that did not see it: 1 - consistency (C-score)",
    "vulnerability": "how far its margins are apart, in and out (LiRA)",
}


def compared_section(
    rows: Sequence[Correlation], attacked: Sequence[Attacked], epsilon: float, stale: str = ""
) -> str:
    """Its HTML: memorization at `epsilon` against each measure; empty if there is none.

    `stale` says that the attacks are of other trials than the scores: then they are left out.
    """
    cells = [_cells(row) for row in sorted(rows, key=lambda row: -_order(row.spearman))]
    cells += [
        ("vulnerability", shown(a.correlation), f"{a.correlation.ceiling:.2f}", "", "", "",
         f"{a.correlation.examples:,}")
        for a in attacked
        if a.epsilon == epsilon and not stale and not math.isnan(a.correlation.value)
    ]  # fmt: skip
    if not cells:
        return ""
    at = at_epsilon(epsilon)
    body = [(name, MEANINGS[name], *more) for name, *more in cells]
    return (
        f'<h2 id="compared">What is correlated with memorization{at}</h2>\n'
        "<p>Every measure that the same trials give, against memorization over training examples, "
        "with 95% intervals. <i>At most</i> is the largest rank correlation that ties allow. Where "
        "models fit what they train on, <code>wrong_out</code> is memorization itself.</p>\n"
        f"{_table(TITLES, body, words=1)}{_notes(rows)}"
    )


def _cells(row: Correlation) -> tuple[str, ...]:
    without_noise = row.pearson_disattenuated
    return (
        row.measure,
        row.spearman.shown(2),
        f"{row.ceiling:.2f}",
        row.among_memorized.shown(2),
        row.auc.shown(2),
        "" if math.isnan(without_noise) else f"{without_noise:.2f}",
        f"{row.examples:,}",
    )


def _notes(rows: Sequence[Correlation]) -> str:
    """What ties and noise do, and curvature at equal loss."""
    if not rows:
        return ""
    notes = f'<p class="small">{_t(ties_text(rows[0]))}</p>\n'
    table = equal_loss_table(rows)
    if table is None:
        return notes
    body = list(zip(*table.to_pydict().values(), strict=True))
    return (
        f"{notes}<p>Rank correlation of memorization and curvature at equal loss:</p>\n"
        f'{_table(table.column_names, body)}<p class="small">{_t(NOT_A_TEST)}</p>\n'
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0) -> str:
    """HTML; after each row's name `words` cells are text, the rest numbers."""
    head = "".join(f'<th scope="col">{_t(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{_t(name)}</th>'
        + "".join(f"<td>{_t(cell)}</td>" for cell in more[:words])
        + "".join(f'<td class="number">{_t(cell)}</td>' for cell in more[words:])
        + "</tr>"
        for name, *more in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>\n"
    )


def _order(c: Coefficient) -> float:
    return -2.0 if math.isnan(c.value) else c.value


def membership_section(attacked: Sequence[Attacked], chart: str, stale: str = "") -> str:
    """Its HTML, empty if nothing was attacked. `chart` is the figure's HTML, `stale` says that
    trials came later; text is escaped here."""
    if not attacked:
        return ""
    few = ""
    if any(here.by_references for here in attacked):
        few = f"<p>{_t(REFERENCES_HEAD)}:</p>{_html_table(references_table(attacked))}"
    notes = "".join(
        f'<p class="small">Epsilon {epsilon_name(here.epsilon)}: {_t(note)}.</p>'
        for here in attacked
        for note in here.notes
    )
    sentences = "".join(
        f"<p>{_t(text(here))}</p>" for here in attacked for text in (best_text, correlation_text)
    )
    late = f'<p class="red-note">{_t(stale)}</p>' if stale else ""
    return (
        '<h2 id="membership">Membership inference</h2>\n'
        "<p>Trials attacked with the others: can their subset be told from their margins (LiRA, "
        "Carlini et al. 2022; RMIA, Zarifzadeh et al. 2024)? TPR is the share of members found, "
        "FPR that of others taken for members; standard errors are over target trials.</p>"
        f"{late}\n"
        f"{_html_table(attacks_table(attacked))}{few}{sentences}{chart}{notes}\n"
    )


def leave_one_out_section(found: LeftOut | None, chart: str) -> str:
    """Its HTML, empty without such an experiment. `chart` is the figure's HTML."""
    if found is None:
        return ""
    return (
        '<h2 id="leave-one-out">How far the scores are from leaving one out</h2>\n'
        "<p>Memorization is defined by leaving one example out of the whole set (Feldman 2019); "
        "scores are of random subsets, which lack other examples as well. Some examples were left "
        "out one by one; 95% intervals.</p>\n"
        f"{_html_table(bias_table(found))}<p>{_t(found.verdict)}.</p>{chart}"
        f"<details><summary>Every example</summary>{_html_table(example_table(found))}</details>\n"
        f'<p class="small">{_t(sources_text(found))}.</p>\n'
    )


def _html_table(table: pa.Table) -> str:
    head = "".join(f'<th scope="col">{_t(name)}</th>' for name in table.column_names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_t(cell)}</td>" for cell in row.values()) + "</tr>"
        for row in table.to_pylist()
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def stale_text(attacked: Sequence[Attacked], scored: dict[float, int]) -> str:
    """Says at which epsilons other trials were attacked than the scores are of; else empty."""
    late = [a for a in attacked if scored.get(a.epsilon, 0) != a.trials]
    if not late:
        return ""
    counts = ", ".join(
        f"{a.trials:,} trials at epsilon {epsilon_name(a.epsilon)}, of which "
        f"{scored.get(a.epsilon, 0):,} are scored now"
        for a in late
    )
    return f"These numbers are of {counts}: run `raymem membership` again."


def _t(value: object) -> str:
    return html.escape(str(value), quote=True)
