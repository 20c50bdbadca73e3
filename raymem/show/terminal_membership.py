"""Membership inference for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raymem.encoding import at_epsilon, epsilon_name
from raymem.scores import Attacked, Membership
from raymem.show.result_tables import (
    attacks_table,
    references_table,
    vulnerable_table,
)
from raymem.show.table import Estimate, format_table, percent


def membership_text(found: Membership) -> str:
    """What attacks reached at each epsilon, the most vulnerable examples, what to mind."""
    attacked = list(found.attacked.values())
    parts = [format_table(attacks_table(attacked))]
    if any(here.by_references for here in attacked):
        parts.append(format_table(references_table(attacked)))
    for here in attacked:
        at = at_epsilon(here.epsilon)
        parts += [best_text(here), correlation_text(here)]
        if here.most_vulnerable:
            parts.append(format_table(vulnerable_table(here)))
        parts += [f"NOTE{at}: {note}" for note in here.notes]
    parts += [
        f"epsilon {epsilon_name(epsilon)}: not attacked: {why}"
        for epsilon, why in found.refused.items()
    ]
    return "\n\n".join(parts)


def best_text(here: Attacked) -> str:
    """What RMIA was computed with and which attack `attack_auc` is of, in two sentences."""
    at = at_epsilon(here.epsilon)
    names = " or ".join(here.best_attacks) or "none"
    return (
        f"RMIA{at} compares with {here.population:,} training examples, drawn at random. The "
        f"attack with the highest AUC, by the other half of the examples, is {names}: attack_auc "
        "is its AUC on one example over the targets."
    )


def correlation_text(here: Attacked) -> str:
    """The correlation of vulnerability and memorization, in a sentence."""
    at = at_epsilon(here.epsilon)
    rho = here.correlation
    if math.isnan(rho.value):
        return f"Vulnerability and memorization{at}: not known, one of them does not vary."
    goes = "has no significant correlation with"
    if rho.low > 0 or rho.high < 0:
        goes = f"is {'positively' if rho.low > 0 else 'negatively'} correlated with"
    shown = Estimate(rho.value, rho.low, rho.high).text(".3f")
    return (
        f"Vulnerability {goes} memorization{at}: rank correlation {shown} over "
        f"{rho.examples:,} training examples (95% bootstrap over examples; one from half of the "
        f"trials, one from the other half), of at most {rho.ceiling:.3f}, because "
        f"{percent(rho.tied)} of the examples have memorization {rho.tied_at:.2g} in their half."
    )


def stale_text(attacked: Sequence[Attacked], scored: Mapping[float, int]) -> str:
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
