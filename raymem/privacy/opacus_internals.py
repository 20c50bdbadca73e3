"""All that raymem uses of opacus and that opacus does not document. Tried with opacus 1.6.0.

The discretized privacy loss of its PRV accountant. Without it, total variation is unknown, and with
it the tightest bound on the mean of memorization. tests/test_upgrades.py says if it moved.
"""

from __future__ import annotations

from typing import Protocol


class PrivacyLoss(Protocol):
    """A discretized privacy loss random variable (Gopi et al. 2021)."""

    def compute_delta_estimate(self, eps: float) -> float:
        """Delta at an epsilon."""


def privacy_loss(
    noise_multiplier: float, sample_rate: float, steps: int, *, eps_error: float, delta_error: float
) -> PrivacyLoss:
    """The privacy loss of all steps together; opacus itself shows epsilon at a delta only."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    loss: PrivacyLoss = accountant._get_dprv(eps_error=eps_error, delta_error=delta_error)
    return loss
