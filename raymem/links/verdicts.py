"""What each link comes to, in a sentence: its estimate, its interval, and what it does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymem.encoding import at_epsilon, epsilon_name
from raymem.links.correlation import Correlation, has_curvature
from raymem.links.epsilons import Change, Link2, Observed
from raymem.links.link1_costs import TARGET, Costs
from raymem.links.one_model import OneModel


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one link; `str` is all of it as text."""

    text: str
    """The finding, with its numbers."""
    estimate: float = math.nan
    """The number it rests on; NaN if there is none."""
    low: float = math.nan
    """Its 95% interval."""
    high: float = math.nan
    not_shown: str = ""
    """What a reader might conclude, and must not; empty if nothing was found."""

    def __str__(self) -> str:
        return f"{self.text}. Not shown: {self.not_shown}" if self.not_shown else self.text


def verdicts_on_link1(found: Mapping[float, Sequence[Correlation]]) -> list[Verdict]:
    """One for each epsilon at which curvature was measured, or one that it was not."""
    said = [verdict_on_link1(e, rows) for e, rows in found.items() if has_curvature(rows)]
    return said or [Verdict(text="link 1: not known, curvature was not measured")]


def verdict_on_link1(epsilon: float, rows: Sequence[Correlation]) -> Verdict:
    """Is curvature of out-models correlated with memorization, and how is the loss?"""
    by_name = {row.measure: row for row in rows}
    at = at_epsilon(epsilon)
    curved, loss = by_name.get("curvature_out"), by_name.get("loss_out")
    if curved is None or math.isnan(curved.spearman.value):
        return Verdict(text=f"link 1{at}: not known, curvature of out-models was not measured")
    rho = curved.spearman
    goes = "has no significant correlation with"
    if rho.low > 0 or rho.high < 0:
        goes = "is positively correlated with" if rho.low > 0 else "is negatively correlated with"
    text = f"link 1{at}: curvature of out-models {goes} memorization: {_numbers(curved)}"
    if loss is not None and not math.isnan(loss.spearman.value):
        text += f". The loss of the same models: {_numbers(loss)}"
    return Verdict(
        text=text,
        estimate=rho.value,
        low=rho.low,
        high=rho.high,
        not_shown="whether curvature carries information about memorization that the loss does "
        "not; memorization is nearly a function of the loss of out-models, so that no correlation "
        "given that loss can tell",
    )


def _numbers(row: Correlation) -> str:
    """Spearman's and what to read it by, the AUC, Pearson's without noise."""
    parts = [f"Spearman {row.spearman.format(2)}"]
    if row.ceiling < 0.995:
        parts[0] += (
            f" of at most {row.ceiling:.2f} ({100 * row.tied:.0f}% of the examples have "
            f"memorization {row.tied_at:.2g})"
        )
    if row.among_memorized.format(2):
        parts.append(f"{row.among_memorized.format(2)} among those above 0")
    if row.auc.format(2):
        parts.append(f"AUC {row.auc.format(2)} for memorization above 0.25")
    if not math.isnan(row.pearson_disattenuated):
        parts.append(f"Pearson {row.pearson_disattenuated:.2f} when disattenuated")
    return ", ".join(parts)


def verdicts_on_costs(
    found: Mapping[float, Costs], alone: Mapping[float, Sequence[OneModel]]
) -> list[Verdict]:
    """Is curvature three orders of magnitude cheaper (Ravikumar et al. 2024)? At each epsilon."""
    return [verdict_on_costs(e, c, alone.get(e, ())) for e, c in found.items()]


def verdict_on_costs(epsilon: float, c: Costs, alone: Sequence[OneModel]) -> Verdict:
    """Time for memorization against time for curvature at equal reliability, and the correlation of
    a single model's curvature with memorization."""
    at = at_epsilon(epsilon)
    kinds = [("the trained models", c.ratio_at_target)]
    if not math.isnan(c.epochs_reliability):
        kinds.append(("averaged over training", c.epochs_ratio_at_target))
    matched = [
        f"{_times(ratio)} ({kind})" for kind, ratio in kinds if not math.isnan(ratio) and ratio > 0
    ]
    text = f"link 1, cost{at}: "
    text += (
        f"at reliability {TARGET:g} of both, memorization costs {' and '.join(matched)} what "
        "curvature costs with the training of its models; the paper says three orders of magnitude"
        if matched
        else "not known at equal reliability, which needs two blocks of trials that measured both"
    )
    singles = {row.measure: row for row in alone}
    for name, kind in (
        ("curvature", "One model's curvature"),
        ("curvature_over_training", "Averaged over its training it"),
    ):
        row = singles.get(name)
        if row is None or math.isnan(row.spearman):
            continue
        price = c.training_seconds / row.seconds if row.seconds > 0 else math.nan
        text += (
            f". {kind} costs 1/{price:.3g} of memorization from {c.trials:,} models and has a "
            f"Spearman correlation of {row.spearman:.2f} ({row.spearman_low:.2f} to "
            f"{row.spearman_high:.2f} over {row.models:,} models) with it"
        )
    return Verdict(
        text=text,
        estimate=c.ratio_at_target,
        not_shown="that the cheaper measure can replace the other: they agree only as far as the "
        "correlations say",
    )


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def verdict_on_link2(link: Link2) -> Verdict:
    """Does curvature rise with epsilon where gradients are clipped alike, what is clipping, and
    how does the theorem's law do?"""
    seen = [o for o in link.observed if o.curvature is not None]
    alike = [o for o in link.fitted if o.curvature is not None]
    if len(seen) < 2:
        return Verdict(text="link 2: not known, it needs curvature at several epsilons")
    ends = (alike[0], alike[-1]) if len(alike) > 1 else (seen[0], seen[-1])
    change = _change(*ends)
    where = " where all gradients are clipped" if len(alike) > 1 else ""
    text = f"link 2: mean curvature {_rises(change)} with epsilon{where}, {_from_to(*ends, change)}"
    most = max(alike or seen, key=lambda o: o.curvature or 0.0)
    if most not in ends:
        text += f", but is largest at {epsilon_name(most.epsilon)} ({most.curvature:.3g})"
    text += "".join(f"; {part}" for part in (_at_inf(link, alike), _of_the_laws(link)) if part)
    return Verdict(
        text=text,
        estimate=change.value,
        low=change.low,
        high=change.high,
        not_shown="that the theorem's bound explains the change (its slope stands for m + 1, and "
        "is fitted: only a shape is compared), or that the same holds for another optimizer or "
        "clipping norm",
    )


def _change(first: Observed, last: Observed) -> Change:
    assert first.curvature is not None
    assert last.curvature is not None
    errors = (first.curvature_stderr or math.nan, last.curvature_stderr or math.nan)
    return Change.between(first.curvature, errors[0], last.curvature, errors[1])


def _rises(change: Change) -> str:
    if change.low > 0 or change.high < 0:
        return "rises" if change.value > 0 else "falls"
    return "does not change significantly"


def _from_to(first: Observed, last: Observed, change: Change) -> str:
    known = "its interval is not known with one trial"
    if not math.isnan(change.low):
        known = f"[{change.low:.3g}, {change.high:.3g}]"
    return (
        f"from {first.curvature:.3g} at {epsilon_name(first.epsilon)} to {last.curvature:.3g} at "
        f"{epsilon_name(last.epsilon)} (change {change.value:.3g} {known})"
    )


def _at_inf(link: Link2, alike: Sequence[Observed]) -> str:
    """What clipping and what noise does at epsilon inf, as far as it can be told."""
    last = link.observed[-1]
    if link.clipped_at_inf is None or last.curvature is None:
        return ""
    if not link.clipped_at_inf:
        from_last = (
            f" from {alike[-1].curvature:.3g} at {epsilon_name(alike[-1].epsilon)}" if alike else ""
        )
        return (
            f"the change{from_last} to {last.curvature:.3g} at inf is that of clipping and of the "
            "remaining noise together: without a clip-only control (--clip-control) they cannot "
            "be told apart"
        )
    if link.clipping is None:
        return (
            "at inf gradients are clipped without noise, so that all of this change is that of "
            "noise; nothing was trained without clipping, whose effect is not known"
        )
    c = link.clipping
    interval = "" if math.isnan(c.low) else f" [{c.low:.3g}, {c.high:.3g}]"
    return (
        "at inf gradients are clipped without noise, so that all of this change is that of noise; "
        f"training without clipping changes curvature by {c.value:.3g}{interval} more"
    )


def _of_the_laws(link: Link2) -> str:
    if not link.fits:
        return ""
    error = {fit.law: fit.loo_rmse for fit in link.fits}
    best = link.fits[0].law
    text = (
        f"error at left-out epsilons: {error['theorem']:.3g} by the theorem's law, "
        f"{error['theorem-constant-loss']:.3g} by it with constant L"
    )
    return text if best.startswith("theorem") else f"{text}, {error[best]:.3g} by the {best} law"
