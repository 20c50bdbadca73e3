"""Differentially private training: the mechanism, what it costs, and what it bounds.

In:  `Privacy` settings, an epsilon, the nominal subset size.
Out: a `Mechanism`, the same for all trials of that epsilon; `PrivateSteps` that carry it out; the
     bounds on memorization that follow; audits that could refute them.

opacus is imported here and nowhere else.
"""

from typing import TYPE_CHECKING

from raymem.lazy import lazy_attributes

if TYPE_CHECKING:
    from raymem.privacy.bounds import (
        Bound,
        bounds_on_memorization,
        fixed_size_bound,
        honest_bound,
        paper_bound,
        sharp_bound,
        tightest,
    )
    from raymem.privacy.empirical_epsilon import (
        certified_epsilon,
        clopper_pearson,
        largest_refuted,
        lower_limit_of_difference,
        one_run_epsilon,
        one_run_p_value,
    )
    from raymem.privacy.mechanism import (
        EPSILON_GRIDS,
        Mechanism,
        Privacy,
        check_epsilons,
        mechanism_for,
    )
    from raymem.privacy.membership_audit import (
        guess_distribution,
        guess_p_value,
        highest_are_in,
        rank_tail,
        summed,
    )
    from raymem.privacy.per_example import (
        check_frozen,
        check_function,
        check_private,
        clipped_sum,
        frozen_state,
    )
    from raymem.privacy.sgd import (
        PerExample,
        PrivateSteps,
        modes_of,
        physical_batches,
        poisson_batch,
    )
    from raymem.privacy.tradeoff import Tradeoff, gaussian_delta


__all__ = [
    "EPSILON_GRIDS",
    "Bound",
    "Mechanism",
    "PerExample",
    "Privacy",
    "PrivateSteps",
    "Tradeoff",
    "bounds_on_memorization",
    "certified_epsilon",
    "check_epsilons",
    "check_frozen",
    "check_function",
    "check_private",
    "clipped_sum",
    "clopper_pearson",
    "fixed_size_bound",
    "frozen_state",
    "gaussian_delta",
    "guess_distribution",
    "guess_p_value",
    "highest_are_in",
    "honest_bound",
    "largest_refuted",
    "lower_limit_of_difference",
    "mechanism_for",
    "modes_of",
    "one_run_epsilon",
    "one_run_p_value",
    "paper_bound",
    "physical_batches",
    "poisson_batch",
    "rank_tail",
    "sharp_bound",
    "summed",
    "tightest",
]

__getattr__ = lazy_attributes(__name__, __file__)
