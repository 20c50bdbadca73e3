"""All three links of one store, for people and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymem.links.audit import Audit, link3, verdict
from raymem.links.curvature import Correlation, by_memorization, correlations
from raymem.links.epsilons import Link2, link2, plain
from raymem.store import Store


@dataclass(frozen=True, kw_only=True)
class Links:
    """What one store says of the three links."""

    correlations: dict[float, list[Correlation]]
    """Link 1, by epsilon; empty if curvature was not measured."""
    bins: dict[float, pa.Table]
    """Link 1 in bins of memorization."""
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
                _name(epsilon): [
                    {
                        "measure": row.measure,
                        "spearman": plain(vars(row.spearman)),
                        "pearson": plain(vars(row.pearson)),
                        "examples": row.examples,
                        "folds": row.folds,
                    }
                    for row in rows
                ]
                for epsilon, rows in self.correlations.items()
            },
            "link_1_bins": {_name(e): bins.to_pylist() for e, bins in self.bins.items()},
            "link_2_curvature_and_epsilon": self.curvature.as_dict(),
            "link_3_memorization_and_epsilon": [audit.as_dict() for audit in self.memorization],
            "link_3_verdict": self.verdict,
        }


def find_links(store: Store, *, seed: int = 0) -> Links:
    """The three links of a scored store. Raises StoreError without scores."""
    return Links(
        correlations=correlations(store, seed=seed),
        bins=by_memorization(store),
        curvature=link2(store, seed=seed),
        memorization=link3(store),
    )


def _name(epsilon: float) -> str:
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"
