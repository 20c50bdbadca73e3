"""How much privacy steps cost: opacus' accountants, and the noise that a budget needs.

All of it is for Poisson sampling with rate q and Gaussian noise of sigma times the clipping norm.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from raymem.errors import PrivacyError, first_line
from raymem.privacy.opacus_internals import privacy_loss

# Relative width at which the search for the noise ends.
TOLERANCE = 2e-3
LARGEST_NOISE = 1e4
# Half width of what an epsilon is known to, by PRV: absolute, and of epsilon. The mesh of its
# distribution is as fine, and as long as epsilon is large.
EPSILON_ERROR, RELATIVE_ERROR = 0.01, 1 / 400
# The same of the epsilons at which the profile of delta is read, and which: shares of the budget.
PROFILE_ERROR, RELATIVE_PROFILE_ERROR = 1e-3, 1 / 4000
PROFILED = (0.0, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)


class Account(NamedTuple):
    """The noise of a mechanism, and what it costs."""

    noise_multiplier: float
    accountant: str
    epsilon: float
    total_variation: float | None
    profile: tuple[tuple[float, float], ...] = ()


def spent_epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str,
    *,
    error: float = EPSILON_ERROR,
) -> float:
    """Upper bound on the epsilon spent at `delta`, by the accountant `prv` or `rdp`.

    `prv` finds it within 2 `error`. Raises PrivacyError where the accountant fails.

    >>> round(spent_epsilon(1.5, 0.04, 2250, 1e-5, "rdp"), 3)
    7.329
    """
    from opacus.accountants import create_accountant

    counter = create_accountant(accountant)
    precision = {"eps_error": error} if accountant == "prv" else {}
    counter.history = [(noise_multiplier, sample_rate, steps)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of RDP's orders; the result is an upper bound anyway
            found = float(counter.get_epsilon(delta, **precision))
    except (RuntimeError, ValueError, FloatingPointError, MemoryError, IndexError) as error:
        raise PrivacyError(
            f"the {accountant} accountant fails for sigma {noise_multiplier:g}, rate "
            f"{sample_rate:g}, {steps:,} steps ({first_line(error)}); take the accountant rdp"
        ) from error
    if not math.isfinite(found):
        raise PrivacyError(f"the {accountant} accountant gives epsilon {found}; take the other one")
    return found


def calibrated(
    epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str
) -> Account:
    """The least noise whose cost at `delta` is at most `epsilon`, to 0.2%.

    By `prv`, or by `rdp` where that fails; which one is recorded. Raises PrivacyError if noise of
    1e4 is not enough.
    """
    tried = ["rdp"] if accountant == "rdp" else ["prv", "rdp"]
    for name in tried:
        try:
            sigma, spent = _search(epsilon, delta, sample_rate, steps, name)
        except PrivacyError:
            if name == tried[-1]:
                raise
            continue
        profile = privacy_profile(
            sigma,
            sample_rate,
            steps,
            [share * spent for share in PROFILED],
            error=max(PROFILE_ERROR, epsilon * RELATIVE_PROFILE_ERROR),
        )
        return Account(sigma, name, spent, profile[0][1] if profile else None, profile)
    raise AssertionError("unreachable")


def _search(epsilon: float, delta: float, q: float, steps: int, name: str) -> tuple[float, float]:
    """The least noise that is enough, by bisection."""
    if name != "rdp":
        # RDP is fast and asks for a little more noise than PRV: its answer is where to look.
        try:
            most, _ = _search(epsilon, delta, q, steps, "rdp")
        except PrivacyError:  # of small epsilons RDP knows nothing
            pass
        else:
            spent = _cost(most, epsilon, q, steps, delta, name)
            if spent <= epsilon:
                return _bisected(epsilon, delta, q, steps, name, (0.7 * most, most), spent)
    too_little, enough = 0.0, 1.0
    while (spent := _cost(enough, epsilon, q, steps, delta, name)) > epsilon:
        too_little, enough = enough, 2 * enough
        if enough > LARGEST_NOISE:
            raise PrivacyError(
                f"no noise up to {LARGEST_NOISE:g} gives epsilon {epsilon:g} at delta {delta:g} in "
                f"{steps:,} steps of rate {q:g}; take a larger epsilon, or fewer epochs"
            )
    return _bisected(epsilon, delta, q, steps, name, (too_little, enough), spent)


def _bisected(
    epsilon: float,
    delta: float,
    q: float,
    steps: int,
    name: str,
    bracket: tuple[float, float],
    spent: float,
) -> tuple[float, float]:
    too_little, enough = bracket
    while enough - too_little > TOLERANCE * enough:
        middle = (too_little + enough) / 2
        cost = _cost(middle, epsilon, q, steps, delta, name)
        if cost <= epsilon:
            enough, spent = middle, cost
        else:
            too_little = middle
    return enough, spent


def _cost(sigma: float, epsilon: float, q: float, steps: int, delta: float, name: str) -> float:
    """The epsilon spent; inf where noise is so little that the accountant gives up."""
    error = max(EPSILON_ERROR, epsilon * RELATIVE_ERROR)
    try:
        return spent_epsilon(sigma, q, steps, delta, name, error=error)
    except PrivacyError:
        if sigma < 0.3:
            return math.inf
        raise


def privacy_profile(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    epsilons: Sequence[float],
    *,
    error: float = PROFILE_ERROR,
) -> tuple[tuple[float, float], ...]:
    """Each of `epsilons` with an upper bound on its delta; empty where the accountant fails.

    Deltas of the composed privacy loss (Gopi et al. 2021), read off its discretization, with that
    one's errors added. At epsilon 0 it is the total variation distance between the models with and
    without one example.

    >>> ((_, delta),) = privacy_profile(2.0, 1.0, 1, [0.0])
    >>> round(delta, 2)  # 2 Phi(1 / (2 sigma)) - 1 = 0.1974
    0.2
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = privacy_loss(
                noise_multiplier, sample_rate, steps, eps_error=error, delta_error=error / 10
            )
        # Gopi et al. 2021, Theorem 5.5: shifted by the errors, the estimate is an upper bound.
        deltas = [float(loss.compute_delta_estimate(e - error)) + error / 10 for e in epsilons]
    except (RuntimeError, ValueError, FloatingPointError, MemoryError, IndexError):
        return ()
    if not all(map(math.isfinite, deltas)):
        return ()
    return tuple((float(e), min(1.0, d)) for e, d in zip(epsilons, deltas, strict=True))
