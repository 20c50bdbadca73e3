"""Scores: memorization, influence and membership inference, and the tables of a store.

Plain arrays in, plain arrays out, without Ray or torch:

    memorization, influence, find_pairs   masks and outcomes -> estimates with intervals
    lists, power, stopping                what can be concluded, with how many trials

Trial files -> tables; both take the trials that are committed when they start, and may be repeated
at any time, also while the fleet runs:

    score        scores/*.parquet: one row per (epsilon, example), trials, folds, pairs
    membership   scores/membership.parquet: who was in a model's subset, told from its margins
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.scores.bits import Bits
    from raymem.scores.estimates import (
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
    from raymem.scores.influence_pairs import (
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
    from raymem.scores.lists import list_with_fdr, probability_above
    from raymem.scores.membership_inference import Attacked, Membership, membership, read_membership
    from raymem.scores.power import (
        expected_stderr,
        expected_width,
        power_of_pairs,
        power_to_list,
        trials_for,
    )
    from raymem.scores.roc import Attack, Rate, attack
    from raymem.scores.scoring import EpsilonSummary, score
    from raymem.scores.stopping import LEAST_FIT, InterimResult, Until, fit_of_hard
    from raymem.scores.streamed_curvature import join_curvature
    from raymem.scores.trial_sums import interim_result, trial_folds
    from raymem.scores.vulnerability_correlation import RankCorrelation


__all__ = [
    "LEAST_FIT",
    "Attack",
    "Attacked",
    "Bits",
    "EpsilonSummary",
    "Estimate",
    "InfluencePairs",
    "InterimResult",
    "Membership",
    "Memorization",
    "PairRule",
    "RankCorrelation",
    "Rate",
    "Until",
    "attack",
    "correlation_interval",
    "difference_of_means",
    "difference_of_proportions",
    "expected_stderr",
    "expected_width",
    "find_pairs",
    "fit_of_hard",
    "forecast_trials",
    "hypergeometric_tail",
    "influence",
    "interim_result",
    "join_curvature",
    "join_pairs",
    "list_with_fdr",
    "mean_and_stderr",
    "membership",
    "memorization",
    "most_tied",
    "of_one_class",
    "pairs_per_class",
    "pairs_work",
    "power_of_pairs",
    "power_to_list",
    "probability_above",
    "ratio",
    "read_membership",
    "reliability",
    "score",
    "spearman_ceiling",
    "trial_folds",
    "trials_for",
]

__getattr__ = lazy_attributes(__name__, __file__)
