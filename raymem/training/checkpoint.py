"""Where a trial was when its worker was lost: what is saved between two batches, and read back.

`Training` holds all that changes while a model trains; a checkpoint is that, as bytes. On one CPU a
resumed trial ends as the undisturbed one does, to the bit. A model trained in a group is saved as
one trained alone is, and goes on in any group or alone.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raymem.errors import first_line
from raymem.training.batches import Stream
from raymem.training.epoch_curvature import EpochCurvature
from raymem.training.history import History, SubsetHistory


class Checkpoints(Protocol):
    """Where one trial's checkpoints go."""

    def load(self) -> bytes | None:
        """The last one saved, or None."""

    def due(self) -> bool:
        """Is it time for another?"""

    def save(self, data: bytes) -> None:
        """Put it in place of the last one."""


class Moves(Protocol):
    """An optimizer: raymem's own, or one of torch.optim."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Copied into the tensors that are there."""


class Training:
    """The state of one model's training: n examples in the subset, on one device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Moves,
        scaler: torch.amp.GradScaler,
        n: int,
        order_seed: int,
        augment_seed: int,
        epochs: EpochCurvature | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.n = n
        """Examples in the subset."""
        self.stream = Stream(n, order_seed, augment_seed)
        self.epoch = self.step = 0
        """Epochs that are over; the step to take next."""
        self.drawn_from = 0
        """The step that `stream` was marked at."""
        self.how: list[str] = []
        """How its steps were computed: alone, in a group of how many; more than one if its worker
        was lost."""
        self.history = History(1, n, device)
        self.epochs = epochs
        """Curvature while it trains; None: not measured."""

    def end_epoch(self) -> None:
        """Go on to the next."""
        self.epoch += 1

    def measure(self) -> None:
        """Measure curvature at the end of the epoch, if it is due."""
        if self.epochs is not None and self.epochs.due(self.epoch):
            self.epochs.measure(self.model, self.epoch)

    def shown(self) -> SubsetHistory:
        """What training showed of the subset."""
        return self.history.row(0, self.n)

    def as_bytes(self, more: dict[str, Any] | None = None) -> bytes:
        """A checkpoint; `more` is for `restore` to give back: numbers, text, tensors."""
        buffer = io.BytesIO()
        history = {name: getattr(self.history, name)[0, : self.n] for name in History.NAMES}
        state = {
            "place": [self.epoch, self.step, self.drawn_from],
            "how": self.how,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": history,
            "stream": self.stream.marked,
            "random": _random_states(),
            "epochs": None if self.epochs is None else self.epochs.state_dict(),
            "more": more,
        }
        torch.save(_by_itself(state), buffer)
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
                getattr(self.history, name)[0, : self.n].copy_(value)
            self.epoch, self.step, self.drawn_from = state["place"]
            self.how = state["how"]
            self.stream.go_to(state["stream"])
            if self.epochs is not None:
                self.epochs.load_state_dict(state["epochs"])
        except Exception as error:  # unpicklers raise any kind; the way out is the same
            raise ValueError(
                f"it is no checkpoint of this training ({first_line(error)})"
            ) from error
        if rank == 0:
            _set_random_states(state["random"])
        return state["more"]


def _by_itself(value: Any) -> Any:
    """`value` with tensors that are views of larger ones copied: torch saves whole storages."""
    if isinstance(value, Tensor):
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    if isinstance(value, dict):
        return {key: _by_itself(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_by_itself(item) for item in value)
    return value


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
