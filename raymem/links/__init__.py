"""The three links between curvature, memorization and privacy, from a store's Parquet.

Link 1, memorization against curvature (Ravikumar et al. 2024, Theorem 5.1): `correlations`,
`by_memorization`. Link 2, curvature against epsilon (Theorem 5.3): `link2`. Link 3, memorization
against epsilon (Theorem 5.4), with its bounds and an audit that could refute them: `link3`.
What memorized examples are worth to accuracy (Feldman & Zhang 2020, section 4): `find_removal`.
How far memorization at a subset ratio is from leaving one out: `find_leave_one_out`, `extrapolate`.
"""

from raymem.links.audit import (
    Audit,
    BoundCheck,
    Memorized,
    PoolMean,
    link3,
    memorized_by_epsilon,
    verdict,
)
from raymem.links.binned import Crossed, Line, PaperBins, Plane, paper_bins
from raymem.links.cleaning import LabelErrors, Ranking, label_errors
from raymem.links.correlation import (
    Coefficient,
    Correlation,
    by_memorization,
    correlations,
    has_curvature,
    in_paper_bins,
)
from raymem.links.cross_store import correlations_across, joined
from raymem.links.epsilons import Change, Link2, Observed, fit_link2, link2
from raymem.links.equal_loss import METHODS, NOT_A_TEST, EqualLoss
from raymem.links.fits import Fit, Shape, fit_loss, fit_rivals
from raymem.links.leave_one_out import Bias, LeftOut, find_leave_one_out
from raymem.links.link1_costs import TARGET, Costs, costs
from raymem.links.one_model import OneModel, of_one_model
from raymem.links.pool import leave_one_out_by_scores, most_memorized, removal_by_scores
from raymem.links.removal import (
    Contrast,
    Mean,
    RemovalEffect,
    Removed,
    find_removal,
    removal_effect,
)
from raymem.links.result import (
    Links,
    find_links,
    privacy_links,
    with_private,
)
from raymem.links.run_diagnostics import Finding, diagnostics, red
from raymem.links.twins import Twins, find_twins
from raymem.links.two_ratios import AtRatio, Extrapolated, extrapolate
from raymem.links.two_stages import Parameter
from raymem.links.verdicts import Verdict, verdicts_on_link1

__all__ = [
    "METHODS",
    "NOT_A_TEST",
    "TARGET",
    "AtRatio",
    "Audit",
    "Bias",
    "BoundCheck",
    "Change",
    "Coefficient",
    "Contrast",
    "Correlation",
    "Costs",
    "Crossed",
    "EqualLoss",
    "Extrapolated",
    "Finding",
    "Fit",
    "LabelErrors",
    "LeftOut",
    "Line",
    "Link2",
    "Links",
    "Mean",
    "Memorized",
    "Observed",
    "OneModel",
    "PaperBins",
    "Parameter",
    "Plane",
    "PoolMean",
    "Ranking",
    "RemovalEffect",
    "Removed",
    "Shape",
    "Twins",
    "Verdict",
    "by_memorization",
    "correlations",
    "correlations_across",
    "costs",
    "diagnostics",
    "extrapolate",
    "find_leave_one_out",
    "find_links",
    "find_removal",
    "find_twins",
    "fit_link2",
    "fit_loss",
    "fit_rivals",
    "has_curvature",
    "in_paper_bins",
    "joined",
    "label_errors",
    "leave_one_out_by_scores",
    "link2",
    "link3",
    "memorized_by_epsilon",
    "most_memorized",
    "of_one_model",
    "paper_bins",
    "privacy_links",
    "red",
    "removal_by_scores",
    "removal_effect",
    "verdict",
    "verdicts_on_link1",
    "with_private",
]
