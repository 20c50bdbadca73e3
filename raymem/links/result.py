"""All three links of one store, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from raymem.encoding import JsonObject
from raymem.links.audit import (
    Audit,
    Memorized,
    PoolMean,
    link3,
    memorized_by_epsilon,
    verdict,
)
from raymem.links.binned import PaperBins
from raymem.links.correlation import (
    Correlation,
    by_memorization,
    correlations,
    in_paper_bins,
)
from raymem.links.cross_store import joined
from raymem.links.epsilons import Link2, link2, with_unclipped
from raymem.links.link1_costs import Costs, costs
from raymem.links.one_model import OneModel, of_one_model
from raymem.links.run_diagnostics import Finding, diagnostics
from raymem.links.twins import Twins, find_twins
from raymem.links.verdicts import Verdict, verdict_on_link2, verdicts_on_costs, verdicts_on_link1
from raymem.store import Store


@dataclass(frozen=True, kw_only=True, repr=False)
class Links(JsonObject):
    """The three links of one store; links 2 and 3 may come from a second, private one."""

    correlations: dict[float, list[Correlation]]
    """Link 1, by epsilon: memorization against curvature, if it was measured, and against what else
    a fleet gives; empty for published scores."""
    bins: dict[float, pa.Table]
    """Link 1 in bins of memorization, a tenth wide."""
    paper: dict[float, list[PaperBins]]
    """Link 1 in the paper's bins, of each measure of curvature."""
    costs: dict[float, Costs]
    """What both sides of link 1 cost."""
    one_model: dict[float, list[OneModel]]
    """Measures of one model by itself against memorization, by epsilon."""
    curvature: Link2
    """Link 2."""
    memorization: list[Audit]
    """Link 3, an entry for each epsilon."""
    diagnostics: dict[float, list[Finding]]
    """Whether to trust the run, by epsilon."""
    twins: dict[float, Twins]
    """Memorized examples that another one explains, by epsilon."""
    mean_memorization: dict[float, PoolMean] = field(default_factory=dict)
    """Of this store's own trials, by epsilon, whatever store link 3 is from."""
    memorized: list[Memorized] = field(default_factory=list)
    """Mean memorization, by epsilon, of the examples that are memorized without privacy."""
    private_store: str | None = None
    """Where links 2 and 3 are from, if not from the same store."""
    private_diagnostics: dict[float, list[Finding]] = field(default_factory=dict)
    """Whether to trust that one."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self.verdicts))

    @property
    def verdict(self) -> Verdict:
        """Link 3 in a sentence."""
        return verdict(self.memorization)

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each link: its estimate and interval, and what it does not show."""
        link1 = verdicts_on_link1(self.correlations)
        link1 += verdicts_on_costs(self.costs, self.one_model)
        return [*link1, verdict_on_link2(self.curvature), self.verdict]

    def json_fields(self) -> Mapping[str, object]:
        """links.json."""
        return {
            "diagnostics": self.diagnostics,
            "twins": self.twins,
            "link_1_memorization_and_curvature": self.correlations,
            "link_1_bins": self.bins,
            "link_1_paper_bins": self.paper,
            "link_1_costs": self.costs,
            "link_1_one_model": self.one_model,
            "links_2_and_3_from": self.private_store,
            "links_2_and_3_diagnostics": self.private_diagnostics,
            "link_2_curvature_and_epsilon": self.curvature,
            "link_3_memorization_and_epsilon": self.memorization,
            "link_3_memorized_examples": [
                {"epsilon": epsilon, "memorized": memorized, "others": others}
                for epsilon, memorized, others in self.memorized
            ],
            "link_3_verdict": str(self.verdict),
            "verdicts": self.verdicts,
        }


def find_links(store: Store, *, seed: int = 0) -> Links:
    """The three links of a scored store. Raises StoreError without scores."""
    compared = correlations(store, seed=seed)
    return dataclasses.replace(
        privacy_links(store, seed=seed),
        correlations=compared,
        bins=by_memorization(store),
        paper=in_paper_bins(store, list(compared), seed=seed),
        costs=costs(store, compared),
        one_model=of_one_model(store, list(compared)),
    )


def privacy_links(store: Store, *, seed: int = 0) -> Links:
    """Links 2 and 3 alone, and what says whether to trust them; link 1 takes the longest by far.

    Raises StoreError without scores.
    """
    twins, audits = find_twins(store), link3(store)
    return Links(
        correlations={},
        bins={},
        paper={},
        costs={},
        one_model={},
        curvature=link2(store, seed=seed),
        memorization=audits,
        mean_memorization={a.epsilon: a.pool for a in audits if a.pool is not None},
        memorized=memorized_by_epsilon(store, store),
        diagnostics=diagnostics(store, twins),
        twins=twins,
    )


def with_private(links: Links, private: Links, store: Store, private_store: Store) -> Links:
    """`links` of `store` with links 2 and 3 of `private_store`, a study of the same examples at
    several epsilons, whose own links are `private`.

    Raises StoreError if the examples of the two are not the same.
    """
    joined(store, private_store)
    return dataclasses.replace(
        links,
        curvature=with_unclipped(private.curvature, private_store, store),
        memorization=private.memorization,
        memorized=memorized_by_epsilon(store, private_store),
        private_store=private_store.url,
        private_diagnostics=private.diagnostics,
    )
