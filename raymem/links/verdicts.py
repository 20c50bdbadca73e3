"""What each link comes to, in a sentence: its estimate, its interval, and what it does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymem.links.curvature import Correlation, has_curvature
from raymem.links.epsilons import Link2, plain


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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return plain(vars(self))


def verdicts_on_link1(found: Mapping[float, Sequence[Correlation]]) -> list[Verdict]:
    """One for each epsilon at which curvature was measured, or one that it was not."""
    said = [verdict_on_link1(e, rows) for e, rows in found.items() if has_curvature(rows)]
    return said or [Verdict(text="link 1: not known, curvature was not measured")]


def verdict_on_link1(epsilon: float, rows: Sequence[Correlation]) -> Verdict:
    """Is curvature of out-models correlated with memorization, and how is the loss?"""
    by_name = {row.measure: row for row in rows}
    at = "" if math.isinf(epsilon) else f" at epsilon {epsilon:g}"
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
    parts = [f"Spearman {row.spearman.shown(2)}"]
    if row.ceiling < 0.995:
        parts[0] += (
            f" of at most {row.ceiling:.2f} ({100 * row.tied:.0f}% of the examples have "
            f"memorization {row.tied_at:.2g})"
        )
    if row.among_memorized.shown(2):
        parts.append(f"{row.among_memorized.shown(2)} among those above 0")
    if row.auc.shown(2):
        parts.append(f"AUC {row.auc.shown(2)} for memorization above 0.25")
    if not math.isnan(row.pearson_disattenuated):
        parts.append(f"Pearson {row.pearson_disattenuated:.2f} when disattenuated")
    return ", ".join(parts)


def verdict_on_link2(link: Link2) -> Verdict:
    """Does curvature rise with epsilon, and by the theorem's law?"""
    seen = [o for o in link.observed if o.curvature is not None]
    if len(seen) < 2:
        return Verdict(text="link 2: not known, it needs curvature at several epsilons")
    first, last = seen[0], seen[-1]
    assert first.curvature is not None
    assert last.curvature is not None
    error = math.hypot(first.curvature_stderr or 0, last.curvature_stderr or 0)
    change = last.curvature - first.curvature
    rises = "rises" if change > 0 else "falls"
    if not abs(change) > 2 * error:
        rises = "is not seen to change"
    known = f"{error:.2g}" if math.isfinite(error) else "not known, with one trial"
    text = (
        f"link 2: mean curvature {rises} with epsilon, from {first.curvature:.3g} at "
        f"{first.epsilon:g} to {last.curvature:.3g} at {last.epsilon:g} (standard error of the "
        f"change {known})"
    )
    most = max(seen, key=lambda o: o.curvature or 0.0)
    if most is not first and most is not last:
        text += f", but is largest at {most.epsilon:g} ({most.curvature:.3g})"
    if link.fits:
        best = link.fits[0]
        theorem = next(fit for fit in link.fits if fit.law == "theorem")
        text += (
            "; of the laws tried the theorem's predicts best"
            if best is theorem
            else f"; the {best.law} law predicts left-out epsilons better than the theorem's "
            f"(error {best.loo_rmse:.3g}, {theorem.loo_rmse:.3g})"
        )
    return Verdict(text=text)
