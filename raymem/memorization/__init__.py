"""Memorization and influence from masks and outcomes: estimates, intervals, lists, reliability.

In:  plain arrays, from any fleet. Out: plain arrays. No Ray, no torch.
"""

from raymem.memorization.bits import Bits
from raymem.memorization.estimates import (
    Estimate,
    Memorization,
    correlation_interval,
    difference_of_means,
    difference_of_proportions,
    forecast_trials,
    mean_and_stderr,
    memorization,
    most_tied,
    ratio,
    reliability,
    spearman_ceiling,
)
from raymem.memorization.influence import (
    InfluencePairs,
    PairRule,
    find_pairs,
    hypergeometric_tail,
    influence,
    join_pairs,
    of_one_class,
    pairs_per_class,
    pairs_work,
)
from raymem.memorization.lists import list_with_fdr, probability_above
from raymem.memorization.power import (
    expected_stderr,
    expected_width,
    power_of_pairs,
    power_to_list,
    trials_for,
)
from raymem.memorization.stopping import Look, Until

__all__ = [
    "Bits",
    "Estimate",
    "InfluencePairs",
    "Look",
    "Memorization",
    "PairRule",
    "Until",
    "correlation_interval",
    "difference_of_means",
    "difference_of_proportions",
    "expected_stderr",
    "expected_width",
    "find_pairs",
    "forecast_trials",
    "hypergeometric_tail",
    "influence",
    "join_pairs",
    "list_with_fdr",
    "mean_and_stderr",
    "memorization",
    "most_tied",
    "of_one_class",
    "pairs_per_class",
    "pairs_work",
    "power_of_pairs",
    "power_to_list",
    "probability_above",
    "ratio",
    "reliability",
    "spearman_ceiling",
    "trials_for",
]
