"""The page's section on what else goes with memorization: every number that a fleet gives."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from raymem.links import Coefficient, Correlation
from raymem.membership import Attacked

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


def _t(value: object) -> str:
    return html.escape(str(value), quote=True)
