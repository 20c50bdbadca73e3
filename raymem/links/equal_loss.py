"""Curvature and memorization among examples of equal loss, by methods that disagree.

Memorization is nearly a function of the loss of out-models: models fit what they train on, so that
it is about 1 - accuracy_out. Whatever remains after conditioning on an estimate of that loss is
dominated by the noise of the estimate, by the shape of the function, and by ties. In simulations
where true memorization is an exact function of the true loss, and nothing can be added to it, these
coefficients differ from 0 in most fleets, with signs that depend on the method and on the law of
curvature. They are therefore a description, and have no intervals.

Shapes: N training examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from raymem.links.column_arrays import Floats
from raymem.links.split_half import GIVEN, Halves, partial_spearman, pearson

STRATA = 20
NOT_A_TEST = (
    "None of these is a test of whether curvature adds to the loss: memorization is nearly a "
    "function of loss_out, and where it is exactly that, such coefficients are not 0 either; their "
    "sign depends on the method."
)


@dataclass(frozen=True, kw_only=True)
class EqualLoss:
    """Rank correlation of memorization with curvature at equal loss; NaN where unknown."""

    strata: float
    """Mean of Spearman's coefficient within 20 strata of loss_out of equal size, weighted by
    examples; strata in which memorization does not vary are left out."""
    given_loss_in: float
    """Partial Spearman given loss_in."""
    given_loss_out: float
    """Partial Spearman given loss_out, all from the same trials."""
    cross_half: float
    """Partial Spearman given loss_out, curvature and loss from one half of the trials and
    memorization from the other; mean of both ways over random splits."""

    @property
    def values(self) -> tuple[float, float, float, float]:
        """In the order of `METHODS`."""
        return self.strata, self.given_loss_in, self.given_loss_out, self.cross_half


METHODS = (
    f"within {STRATA} strata of loss_out",
    "partial, given loss_in",
    "partial, given loss_out",
    "partial, given loss_out, across halves",
)


def at_equal_loss(
    name: str, mem: Floats, values: Mapping[str, Floats], halves: Halves
) -> EqualLoss | None:
    """Of one of `values` [N] against memorization [N]; None unless it is curvature and loss_out is
    known."""
    if not name.startswith("curvature") or GIVEN not in values:
        return None
    x, out, inside = values[name], values[GIVEN], values.get("loss_in")
    return EqualLoss(
        strata=within_strata(mem, x, out),
        given_loss_in=math.nan if inside is None else partial_spearman(mem, x, inside),
        given_loss_out=partial_spearman(mem, x, out),
        cross_half=halves.given_loss,
    )


def within_strata(a: Floats, b: Floats, by: Floats, strata: int = STRATA) -> float:
    """Mean Spearman correlation of a and b [N] within strata of `by` [N] of equal size.

    Weighted by examples; strata of fewer than three, and those in which a or b does not vary, are
    left out. NaN if none is left.

    >>> by = np.repeat([0.0, 10.0], 50)
    >>> a = by + np.tile(np.arange(50.0), 2)
    >>> float(round(within_strata(a, -a, by, strata=2), 6))
    -1.0
    """
    known = np.isfinite(a) & np.isfinite(b) & np.isfinite(by)
    order = np.argsort(by[known], kind="stable")
    found, sizes = [], []
    for part in np.array_split(order, strata):
        if len(part) < 3:
            continue
        rho = pearson(stats.rankdata(a[known][part]), stats.rankdata(b[known][part]))
        if not math.isnan(rho):
            found.append(rho)
            sizes.append(len(part))
    return float(np.average(found, weights=sizes)) if found else math.nan
