"""All three links of one store, for people and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raymem.links.audit import Audit, link3, verdict
from raymem.links.binned import Line, PaperBins
from raymem.links.costs import Costs, costs
from raymem.links.curvature import (
    Coefficient,
    Correlation,
    by_memorization,
    correlations,
    in_paper_bins,
)
from raymem.links.epsilons import Link2, link2, plain
from raymem.store import Store


@dataclass(frozen=True, kw_only=True)
class Links:
    """What one store says of the three links."""

    correlations: dict[float, list[Correlation]]
    """Link 1, by epsilon; empty if curvature was not measured."""
    bins: dict[float, pa.Table]
    """Link 1 in bins of memorization, a tenth wide."""
    paper: dict[float, list[PaperBins]]
    """Link 1 in the paper's bins, of each measure of curvature."""
    costs: dict[float, Costs]
    """What both sides of link 1 cost."""
    curvature: Link2
    """Link 2."""
    memorization: list[Audit]
    """Link 3, an entry for each epsilon."""

    @property
    def verdict(self) -> str:
        """Link 3 in a sentence."""
        return verdict(self.memorization)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what links.json holds."""
        return {
            "link_1_memorization_and_curvature": {
                _name(epsilon): [_as_dict(row) for row in rows]
                for epsilon, rows in self.correlations.items()
            },
            "link_1_bins": {_name(e): bins.to_pylist() for e, bins in self.bins.items()},
            "link_1_paper_bins": {
                _name(epsilon): [_bins_as_dict(bins) for bins in rows]
                for epsilon, rows in self.paper.items()
            },
            "link_1_costs": {_name(e): plain(vars(found)) for e, found in self.costs.items()},
            "link_2_curvature_and_epsilon": self.curvature.as_dict(),
            "link_3_memorization_and_epsilon": [audit.as_dict() for audit in self.memorization],
            "link_3_verdict": self.verdict,
        }


def find_links(store: Store, *, seed: int = 0) -> Links:
    """The three links of a scored store. Raises StoreError without scores."""
    compared = correlations(store, seed=seed)
    return Links(
        correlations=compared,
        bins=by_memorization(store),
        paper=in_paper_bins(store, list(compared)),
        costs=costs(store, compared),
        curvature=link2(store, seed=seed),
        memorization=link3(store),
    )


def _name(epsilon: float) -> str:
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"


def _as_dict(row: Correlation) -> dict[str, Any]:
    values = {
        name: plain(vars(value)) if isinstance(value, Coefficient) else value
        for name, value in vars(row).items()
        if name != "disattenuated"
    }
    named = dict(zip(("spearman", "pearson"), row.disattenuated, strict=True))
    return plain({**values, "disattenuated": plain(named)})


def _bins_as_dict(bins: PaperBins) -> dict[str, Any]:
    values = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(bins).items()
    }
    lines = {k: plain(vars(v)) for k, v in values.items() if isinstance(v, Line)}
    return {**values, **lines}
