"""One mechanism for all trials of an epsilon: what is sampled, clipped, added, and how often.

Fixed from the nominal subset size, so that two neighbouring subsets get the same mechanism: a
sampling rate, a number of steps or a divisor that depended on the subset would tell its size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raymem.encoding import JsonObject, from_json
from raymem.errors import PrivacyError

if TYPE_CHECKING:
    from raymem.privacy.tradeoff import Tradeoff

Accountant = Literal["prv", "rdp"]

EPSILON_GRIDS: dict[str, tuple[float, ...]] = {
    # Where 1 - e^-eps moves: a grid from 5 on cannot tell the theorem's shape from a constant.
    "default": (0.5, 1, 2, 4, 8, 16, 32, 64, math.inf),
    "quick": (0.5, 2, 8, math.inf),
    "paper-curvature": tuple(range(5, 101, 5)),
    # The published scripts and notebook have 1 too: the one point there at which
    # 1 - e^-eps is not 1, without which the slope and c2 of Theorem 5.3 cannot be told apart.
    "scripts-curvature": (1, *range(5, 101, 5)),
    "paper-memorization": (1, 10, 20, 30, 40, 50),
}
"""Grids of epsilons by name; the paper's are those of its sections 6.4 and 6.5."""


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Epsilons of the name of a grid, or of numbers between commas. Raises ValueError for others.

    >>> parse_epsilons("0.5,2,inf"), parse_epsilons("quick")
    ((0.5, 2.0, inf), (0.5, 2, 8, inf))
    """
    if text in EPSILON_GRIDS:
        return EPSILON_GRIDS[text]
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"invalid epsilons {text!r}; give numbers such as 0.5,2,8,inf, or a grid: "
            f"{', '.join(EPSILON_GRIDS)}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Privacy(JsonObject):
    """Differential privacy: how trials are trained. Part of a study's identity; epsilons are not.

    A study with this is a private study: all its trials, also those at epsilon inf, draw Poisson
    batches and take the same number of steps. At inf nothing is clipped and no noise is added.

    Raises PrivacyError for settings that make no sense.
    """

    delta: float = 1e-5
    """delta of (epsilon, delta)-DP; below one over the number of examples."""
    max_grad_norm: float = 1.0
    """L2 norm that the gradient of each example is clipped to."""
    accountant: Accountant = "prv"
    """Privacy accountant: prv (Gopi et al. 2021), or rdp (Mironov et al. 2019), which is also used
    where prv fails."""
    clip_control: bool = False
    """Clip gradients at epsilon inf too, without noise: shows what clipping alone does."""
    secure_mode: bool = False
    """Draw noise and batches from the operating system's randomness, and harden the noise against
    floating-point attacks; such a trial cannot be repeated, nor resumed to the same result."""

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise PrivacyError(f"delta must be in (0, 1), got {self.delta}; 1e-5 is usual")
        if not 0 < self.max_grad_norm < math.inf:
            raise PrivacyError(f"max_grad_norm must be a positive number, got {self.max_grad_norm}")
        if self.accountant not in ("prv", "rdp"):
            raise PrivacyError(f"no accountant {self.accountant!r}; take prv or rdp")


@dataclass(frozen=True, kw_only=True)
class Mechanism(JsonObject):
    """What every trial at one epsilon does (DP-SGD, Abadi et al. 2016).

    Each of `steps` steps draws every example of the subset with probability `sample_rate`, clips
    its gradient to `max_grad_norm`, adds Gaussian noise of standard deviation `noise_multiplier`
    times that to the sum, and divides by `expected_batch`.
    """

    epsilon: float
    """The target; inf is not private."""
    delta: float
    sample_rate: float
    """q = expected_batch / nominal subset size."""
    expected_batch: int
    """The divisor of summed gradients, whatever the batch."""
    steps: int
    noise_multiplier: float
    """sigma; 0 at epsilon inf."""
    max_grad_norm: float
    """C; inf: gradients are not clipped."""
    accountant: str
    """`prv` or `rdp`; `none` at epsilon inf."""
    spent_epsilon: float
    """What the accountant says of these steps, an upper bound: never above `epsilon`."""
    total_variation: float | None
    """delta at epsilon 0 of all steps, an upper bound: no event is more likely by more than this
    with one example more. None where the accountant cannot tell."""
    secure_mode: bool = False
    profile: tuple[tuple[float, float], ...] = ()
    """Pairs of an epsilon and an upper bound on its delta, from epsilon 0 on, for the same steps:
    audits test all of them. Empty where the accountant cannot tell, and in older stores."""

    @property
    def tradeoff(self) -> Tradeoff:
        """The curve of everything that is claimed: the budget, the profile, the total variation."""
        points = ((self.spent_epsilon, self.delta), *self.profile)
        if self.total_variation is not None:
            points += ((0.0, self.total_variation),)
        return _curve(points)

    @property
    def clips(self) -> bool:
        """Is each example's gradient clipped?"""
        return math.isfinite(self.max_grad_norm)

    @classmethod
    def from_dict(cls, data: object) -> Mechanism:
        """The inverse of `as_dict`. Raises TypeError or ValueError for other data."""
        return from_json(cls, data)


@functools.lru_cache(maxsize=64)
def _curve(points: tuple[tuple[float, float], ...]) -> Tradeoff:
    from raymem.privacy.tradeoff import Tradeoff

    return Tradeoff.from_points(points)


def check_epsilons(epsilons: tuple[float, ...], n: int, delta: float) -> None:
    """Raises PrivacyError for budgets that are none, or a delta that protects nobody."""
    if not epsilons:
        raise PrivacyError("give at least one epsilon; inf is not private")
    wrong = [epsilon for epsilon in epsilons if not epsilon > 0]
    if wrong:
        raise PrivacyError(f"epsilons must be positive, got {wrong[0]}; inf is not private")
    twice = {epsilon for epsilon in epsilons if epsilons.count(epsilon) > 1}
    if twice:
        raise PrivacyError(f"epsilon {min(twice):g} is given twice")
    if delta * n >= 1:
        raise PrivacyError(
            f"delta {delta:g} is not below 1/n = {1 / n:.1g}: publishing a whole example would be "
            f"allowed; take {0.1 / n:.0e} or less"
        )


def mechanism_for(
    privacy: Privacy, epsilon: float, *, subset_size: int, batch_size: int, epochs: int
) -> Mechanism:
    """The mechanism of all trials at `epsilon` of a study with subsets of nominally `subset_size`.

    The noise is the least that the accountant grants for epsilon. Raises PrivacyError if none does.

    >>> mechanism_for(Privacy(), math.inf, subset_size=1000, batch_size=50, epochs=3).steps
    60
    """
    from raymem.privacy import accounting

    batch = min(batch_size, subset_size)
    q = batch / subset_size
    # Counted in steps: epochs are an expectation, and int(1 / q) loses steps to rounding.
    steps = max(1, round(epochs * subset_size / batch))
    if math.isinf(epsilon):
        account = accounting.Account(0.0, "none", math.inf, None)
        norm = privacy.max_grad_norm if privacy.clip_control else math.inf
    else:
        account = accounting.calibrated(epsilon, privacy.delta, q, steps, privacy.accountant)
        norm = privacy.max_grad_norm
    return Mechanism(
        epsilon=epsilon,
        delta=privacy.delta,
        sample_rate=q,
        expected_batch=batch,
        steps=steps,
        noise_multiplier=account.noise_multiplier,
        max_grad_norm=norm,
        accountant=account.accountant,
        spent_epsilon=account.epsilon,
        total_variation=account.total_variation,
        secure_mode=privacy.secure_mode,
        profile=account.profile,
    )
