"""Where a trial was when its worker was lost: what is saved between two batches, and read back.

`Training` holds all that changes while a model trains; a checkpoint is that, as bytes. On one CPU a
resumed trial ends as the undisturbed one does, to the bit.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raymem.errors import first_line


class Checkpoints(Protocol):
    """Where one trial's checkpoints go."""

    def load(self) -> bytes | None:
        """The last one saved, or None."""

    def due(self) -> bool:
        """Is it time for another?"""

    def save(self, data: bytes) -> None:
        """Put it in place of the last one."""


class Training:
    """The state of one model's training: n examples in the subset, on one device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        n: int,
        order_seed: int,
        augment_seed: int,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.order = torch.Generator().manual_seed(order_seed)
        """Shuffles, one permutation an epoch, or draws Poisson batches."""
        self.draws = torch.Generator().manual_seed(augment_seed)
        """Draws crops and flips."""
        self.epoch = self.batch = 0
        """The batch to train on next."""
        self.epoch_order = self.order.get_state()
        """The state of `order` before this epoch's permutation."""
        self.cumulative_loss = torch.zeros(n, device=device)
        self.was_right = torch.zeros(n, dtype=torch.bool, device=device)
        """Was it right at its last visit?"""
        self.learning_epoch = torch.zeros(n, dtype=torch.int32, device=device)
        self.forgetting_count = torch.zeros(n, dtype=torch.int32, device=device)

    HISTORY = ("cumulative_loss", "was_right", "learning_epoch", "forgetting_count")

    @property
    def n(self) -> int:
        """Examples in the subset."""
        return len(self.was_right)

    def start_epoch(self) -> Tensor:
        """This epoch's order of the n examples, int64 [n]; the same again after a checkpoint."""
        self.order.set_state(self.epoch_order)
        return torch.randperm(self.n, generator=self.order)

    def visit(self, place: Tensor, loss: Tensor, right: Tensor) -> None:
        """Count what a batch showed: places in the subset, losses, was it right, all [B]."""
        self.cumulative_loss[place] += loss
        was_right = self.was_right[place]
        self.forgetting_count[place] += was_right & ~right
        since = torch.where(right & ~was_right, self.epoch + 1, self.learning_epoch[place])
        self.learning_epoch[place] = torch.where(right, since, 0)
        self.was_right[place] = right

    def end_epoch(self) -> None:
        """Go on to the next."""
        self.epoch_order = self.order.get_state()
        self.epoch, self.batch = self.epoch + 1, 0

    def as_bytes(self, more: dict[str, Any] | None = None) -> bytes:
        """A checkpoint; `more` is for `restore` to give back: numbers, text, tensors."""
        buffer = io.BytesIO()
        torch.save(
            {
                "place": [self.epoch, self.batch],
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "history": {name: getattr(self, name) for name in self.HISTORY},
                "order": self.epoch_order,
                "draws": self.draws.get_state(),
                "random": _random_states(),
                "more": more,
            },
            buffer,
        )
        return buffer.getvalue()

    def restore(self, data: bytes, rank: int = 0) -> Any:
        """Go on from a checkpoint; returns its `more`. Raises ValueError if it is none of such a
        training."""
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for name, value in state["history"].items():
                getattr(self, name).copy_(value)
            self.epoch, self.batch = state["place"]
            self.epoch_order = state["order"]
            self.draws.set_state(state["draws"])
        except Exception as error:  # unpicklers raise any kind; the way out is the same
            raise ValueError(
                f"it is no checkpoint of this training ({first_line(error)})"
            ) from error
        if rank == 0:
            _set_random_states(state["random"])
        return state["more"]


def _random_states() -> dict[str, Tensor]:
    """Of torch, for dropout: whatever models draw otherwise starts anew after a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
