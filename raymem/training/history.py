"""What training showed of each example of the subset: counted visit by visit, on the device.

Shapes: G models, n examples in a subset, L visits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SubsetHistory:
    """What training showed of each of the n examples of the subset, in their order.

    Measured on the augmented batches that trained the model, in training mode, as in Toneva et al.
    2019 (forgetting) and Ravikumar et al. 2025 (cumulative sample loss). An example is visited once
    in each pass over the shuffled subset; how often examples are visited differs by one at most.
    """

    cumulative_loss: NDArray[np.float32]
    """[n] Sum over visits of the cross entropy, nats; one visit an epoch, in private training one
    on average."""
    learning_epoch: NDArray[np.int32]
    """[n] First epoch (from 1) from which on it was right at every later visit; 0: never."""
    forgetting_count: NDArray[np.int32]
    """[n] How often it was right at one visit and wrong at the next."""


class History:
    """The histories of G models, each of up to n examples.

    Row g, column i is example i of model g's subset. One more column takes what is to be left out,
    so that models with subsets of different sizes are counted by the same operations.
    """

    NAMES = ("cumulative_loss", "was_right", "learning_epoch", "forgetting_count")

    def __init__(self, G: int, n: int, device: torch.device) -> None:
        self.cumulative_loss = torch.zeros(G, n + 1, device=device)
        self.was_right = torch.zeros(G, n + 1, dtype=torch.bool, device=device)
        """Was it right at its last visit?"""
        self.learning_epoch = torch.zeros(G, n + 1, dtype=torch.int32, device=device)
        self.forgetting_count = torch.zeros(G, n + 1, dtype=torch.int32, device=device)

    def of(self, g: int) -> History:
        """Model g's alone, a view."""
        one = History.__new__(History)
        for name in self.NAMES:
            setattr(one, name, getattr(self, name)[g : g + 1])
        return one

    @property
    def n(self) -> int:
        """Examples of the largest subset."""
        return self.was_right.shape[1] - 1

    def visit(self, place: Tensor, loss: Tensor, right: Tensor, epoch: Tensor | int) -> None:
        """Count visits: places, losses, was it right, [G, L] each; no example twice.

        epoch (from 1) is [G, L] too, or one number.
        """
        self.cumulative_loss.scatter_(1, place, self.cumulative_loss.gather(1, place) + loss)
        was_right = self.was_right.gather(1, place)
        forgotten = self.forgetting_count.gather(1, place) + (was_right & ~right)
        self.forgetting_count.scatter_(1, place, forgotten)
        since = torch.where(right & ~was_right, epoch, self.learning_epoch.gather(1, place))
        since = since.masked_fill(~right, 0).to(torch.int32)
        self.learning_epoch.scatter_(1, place, since)
        self.was_right.scatter_(1, place, right)

    def follow(self, place: Tensor, loss: Tensor, right: Tensor, epoch: Tensor) -> None:
        """Count the visits of several epochs, in the order of their epochs; [G, L] each.

        An example may be visited again in the next epoch, even in the same batch: the visit of the
        earlier epoch comes first.
        """
        for one in range(int(epoch.min()), int(epoch.max()) + 1):
            self.visit(torch.where(epoch == one, place, self.n), loss, right, one)

    def finite(self) -> Tensor:
        """Was every loss finite? bool [G]."""
        return torch.isfinite(self.cumulative_loss[:, : self.n]).all(1)

    def row(self, g: int, n: int) -> SubsetHistory:
        """Model g's, whose subset has n examples."""
        return SubsetHistory(
            cumulative_loss=self.cumulative_loss[g, :n].cpu().numpy(),
            learning_epoch=self.learning_epoch[g, :n].cpu().numpy(),
            forgetting_count=self.forgetting_count[g, :n].cpu().numpy(),
        )
