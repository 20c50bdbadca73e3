"""The page's section on membership inference: what `raymem membership` found, if it was run."""

from __future__ import annotations

import html
from collections.abc import Sequence

from raymem.membership import Attacked
from raymem.text.membership import attacks_table, correlation_text


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
