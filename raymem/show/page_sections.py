"""Two sections of the page: every number that a fleet gives compared with memorization, and
membership inference, if `raymem membership` was run."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from raymem.links import Coefficient, Correlation
from raymem.scores import Attacked
from raymem.show.terminal_membership import attacks_table, correlation_text

# What a person should know of each measure; more of it is what memorization should go with.
MEANINGS = {
    "curvature_out": "input loss curvature under models that did not see the example",
    "curvature_in": "input loss curvature under models that did",
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
    cells = [
        (row.measure, row.spearman.shown(2), row.partial.shown(2), f"{row.examples:,}")
        for row in sorted(rows, key=lambda row: -_order(row.spearman))
    ]
    cells += [
        (
            "vulnerability",
            f"{a.correlation.value:.2f} [{a.correlation.low:.2f}, {a.correlation.high:.2f}]",
            "",
            f"{a.correlation.examples:,}",
        )
        for a in attacked
        if a.epsilon == epsilon and not stale and not math.isnan(a.correlation.value)
    ]
    if not cells:
        return ""
    at = "" if math.isinf(epsilon) else f" at epsilon {epsilon:g}"
    titles = ("measure", "what it is", "rank correlation", "beyond the loss", "examples")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{_t(name)}</th><td>{_t(MEANINGS[name])}</td>'
        + "".join(f'<td class="number">{_t(cell)}</td>' for cell in more)
        + "</tr>"
        for name, *more in cells
    )
    return (
        f'<h2 id="compared">What goes with memorization{at}</h2>\n'
        "<p>Every number that the same trials give, against memorization: rank correlations over "
        "training examples, with 95% intervals. <i>Beyond the loss</i> is the partial correlation "
        "given <code>loss_out</code>. Where models fit what they train on, <code>wrong_out</code> "
        "is memorization itself.</p>\n"
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
    table = attacks_table(attacked)
    head = "".join(f'<th scope="col">{_t(name)}</th>' for name in table.column_names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_t(cell)}</td>" for cell in row.values()) + "</tr>"
        for row in table.to_pylist()
    )
    notes = "".join(
        f'<p class="small">Epsilon {here.epsilon:g}: {_t(note)}.</p>'
        for here in attacked
        for note in here.notes
    )
    sentences = "".join(f"<p>{_t(correlation_text(here))}</p>" for here in attacked)
    late = f'<p class="red-note">{_t(stale)}</p>' if stale else ""
    return (
        '<h2 id="membership">Membership inference</h2>\n'
        "<p>Trials attacked with the others: can their subset be told from their margins (Carlini "
        "et al. 2022)? TPR is the share of members found, FPR that of others taken for members; "
        f"standard errors are over target trials.</p>{late}\n"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{sentences}{chart}{notes}\n"
    )


def stale_text(attacked: Sequence[Attacked], scored: dict[float, int]) -> str:
    """Says at which epsilons other trials were attacked than the scores are of; else empty."""
    late = [a for a in attacked if scored.get(a.epsilon, 0) != a.trials]
    if not late:
        return ""
    counts = ", ".join(
        f"{a.trials:,} trials at epsilon {a.epsilon:g}, of which {scored.get(a.epsilon, 0):,} are "
        "scored now"
        for a in late
    )
    return f"These numbers are of {counts}: run `raymem membership` again."


def _t(value: object) -> str:
    return html.escape(str(value), quote=True)
