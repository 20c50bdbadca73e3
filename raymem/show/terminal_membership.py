"""Membership inference for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from raymem.encoding import at_epsilon, epsilon_name
from raymem.scores import Attack, Attacked, Membership, RankCorrelation, Rate
from raymem.show.terminal_scores import as_text, percent

REFERENCES_HEAD = (
    "With fewer reference trials (each example has the same number of them, the column in of which "
    "trained on it; LiRA has one variance for each arm below 32 in each; offline attacks use only "
    "those that did not)"
)


def membership_text(found: Membership) -> str:
    """What attacks reached at each epsilon, the most vulnerable examples, what to mind."""
    attacked = list(found.attacked.values())
    parts = [
        "Membership inference (LiRA, Carlini et al. 2022; RMIA, Zarifzadeh et al. 2024): scored "
        "trials as targets, attacked with the trials whose subsets are independent of theirs (+- "
        "standard error over targets):\n" + as_text(attacks_table(attacked))
    ]
    if any(here.by_references for here in attacked):
        parts.append(f"{REFERENCES_HEAD}:\n" + as_text(references_table(attacked)))
    for here in attacked:
        at = at_epsilon(here.epsilon)
        parts += [best_text(here), correlation_text(here)]
        if here.most_vulnerable:
            parts.append(
                f"The {len(here.most_vulnerable)} most vulnerable training examples{at} (d': how "
                "many standard deviations their margins are apart, in and out):\n"
                + as_text(pa.Table.from_pylist(here.most_vulnerable))
            )
        parts += [f"NOTE{at}: {note}" for note in here.notes]
    parts += [
        f"epsilon {epsilon_name(epsilon)}: not attacked: {why}"
        for epsilon, why in found.refused.items()
    ]
    return "\n\n".join(parts)


def references_table(attacked: Sequence[Attacked]) -> pa.Table:
    """A row for each epsilon, number of reference trials and attack."""
    rows = [(a, k, one) for a in attacked for k in a.by_references for one in k.attacks]
    return pa.table(
        {
            "epsilon": pa.array([epsilon_name(a.epsilon) for a, _, _ in rows], pa.string()),
            "references": [k.references for _, k, _ in rows],
            "in": [k.references_in for _, k, _ in rows],
            "examples": [k.examples for _, k, _ in rows],
            "attack": pa.array([one.name for _, _, one in rows], pa.string()),
            **_rates([one for _, _, one in rows]),
        }
    )


def best_text(here: Attacked) -> str:
    """What RMIA was computed with and which attack `attack_auc` is of, in two sentences."""
    at = at_epsilon(here.epsilon)
    names = " or ".join(here.best_attacks) or "none"
    return (
        f"RMIA{at} compares with {here.population:,} training examples, drawn at random. The "
        f"attack with the highest AUC, by the other half of the examples, is {names}: attack_auc "
        "is its AUC on one example over the targets."
    )


def attacks_table(attacked: Sequence[Attacked]) -> pa.Table:
    """A row for each epsilon and attack, as people read it."""
    return pa.table(
        {
            "epsilon": pa.array([epsilon_name(a.epsilon) for a in attacked for _ in a.attacks]),
            "trials": [a.trials for a in attacked for _ in a.attacks],
            "targets": [a.targets for a in attacked for _ in a.attacks],
            "attack": [one.name for a in attacked for one in a.attacks],
            **_rates([one for a in attacked for one in a.attacks]),
        }
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
    return (
        f"Vulnerability {goes} memorization{at}: rank correlation {shown(rho, 3)} over "
        f"{rho.examples:,} training examples (95% bootstrap over examples; one from half of the "
        f"trials, one from the other half), of at most {rho.ceiling:.3f}, because "
        f"{percent(rho.tied)} of the examples have memorization {rho.tied_at:.2g} in their half."
    )


def shown(rho: RankCorrelation, digits: int = 2) -> str:
    """A correlation with its interval."""
    return f"{rho.value:.{digits}f} [{rho.low:.{digits}f}, {rho.high:.{digits}f}]"


def _rates(attacks: Sequence[Attack]) -> dict[str, list[str]]:
    """Columns of a table with a row for each attack."""
    return {
        title: [_rate(getattr(one, name), digits) for one in attacks]
        for title, name, digits in (
            ("AUC", "auc", 4),
            ("best balanced accuracy", "balanced_accuracy", 4),
            ("TPR at FPR 0.1%", "tpr_at_low_fpr", 5),
            ("TPR at FPR 1%", "tpr_at_fpr", 4),
        )
    }


def _rate(rate: Rate, digits: int) -> str:
    if math.isnan(rate.value):
        return ""
    more = "" if math.isnan(rate.stderr) else f" +- {rate.stderr:.1g}"
    return f"{rate.value:.{digits}f}{more}"
