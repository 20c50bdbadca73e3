"""torch.optim's SGD, Adam, AdamW and RMSprop over lists of tensors; the learning rate is a tensor.

The same arithmetic moves one model's parameters and the stacked ones of many: everything is
element by element. No number is computed on the host in a step, so that a step can be captured as
a CUDA graph; what changes from step to step is in `rates`, made ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raymem.training.recipe import Recipe, Steps, learning_rate_factor

BETAS, ALPHA, EPSILON = (0.9, 0.999), 0.99, 1e-8


def rates(recipe: Recipe, steps: Steps, start: int, stop: int) -> Tensor:
    """Of the steps from `start` to `stop`: float32 [stop - start, 3].

    Step size; for Adam what the root of the mean squared gradient is multiplied by; what is left of
    the weights by AdamW's decay.
    """
    rows = []
    for step in range(start, stop):
        rate = recipe.learning_rate * learning_rate_factor(recipe, step / steps.total)
        if recipe.optimizer in ("sgd", "rmsprop"):
            rows.append((rate, 1.0, 1.0))
            continue
        first, second = (1 - beta ** (step + 1) for beta in BETAS)
        kept = 1 - rate * recipe.weight_decay if recipe.optimizer == "adamw" else 1.0
        rows.append((rate / first, 1 / math.sqrt(second), kept))
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


class Optimizer:
    """Moves `parameters` in place by their gradients, as `recipe` says."""

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe) -> None:
        self.recipe = recipe
        self.parameters = list(parameters)
        # What torch.amp.GradScaler looks for.
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]
        kept = {"sgd": int(recipe.momentum != 0), "rmsprop": 1}.get(recipe.optimizer, 2)
        self.moments = [[torch.zeros_like(p) for p in self.parameters] for _ in range(kept)]
        """Momentum, Adam's mean and mean square, or RMSprop's mean square, of each parameter."""

    def forget_gradients(self) -> None:
        """Before the next backward pass."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rates: Tensor, gradients: Sequence[Tensor | None] | None = None) -> None:
        """One step; `rates` is [3], gradients are by default those of the backward pass."""
        if gradients is None:
            gradients = [p.grad for p in self.parameters]
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not there:
            return
        moved = [self.parameters[i] for i in there]
        moments = [[moment[i] for i in there] for moment in self.moments]
        slopes = [gradient for gradient in gradients if gradient is not None]
        recipe = self.recipe
        if recipe.weight_decay and recipe.optimizer != "adamw":
            slopes = list(torch._foreach_add(slopes, moved, alpha=recipe.weight_decay))
        update = {"sgd": self._sgd, "rmsprop": self._rmsprop}.get(recipe.optimizer, self._adam)
        update(moved, slopes, moments, rates)

    def _sgd(
        self, moved: list[Tensor], slopes: list[Tensor], moments: list[list[Tensor]], rates: Tensor
    ) -> None:
        if moments:
            momentum = self.recipe.momentum
            torch._foreach_mul_(moments[0], momentum)
            torch._foreach_add_(moments[0], slopes)
            if self.recipe.nesterov:
                slopes = list(torch._foreach_add(slopes, moments[0], alpha=momentum))
            else:
                slopes = moments[0]
        torch._foreach_sub_(moved, torch._foreach_mul(slopes, rates[0]))

    def _adam(
        self, moved: list[Tensor], slopes: list[Tensor], moments: list[list[Tensor]], rates: Tensor
    ) -> None:
        mean, square = moments
        if self.recipe.optimizer == "adamw":
            torch._foreach_mul_(moved, rates[2])
        torch._foreach_lerp_(mean, slopes, 1 - BETAS[0])
        torch._foreach_mul_(square, BETAS[1])
        torch._foreach_addcmul_(square, slopes, slopes, 1 - BETAS[1])
        root = torch._foreach_sqrt(square)
        torch._foreach_mul_(root, rates[1])
        torch._foreach_add_(root, EPSILON)
        step = torch._foreach_div(mean, root)
        torch._foreach_mul_(step, rates[0])
        torch._foreach_sub_(moved, step)

    def _rmsprop(
        self, moved: list[Tensor], slopes: list[Tensor], moments: list[list[Tensor]], rates: Tensor
    ) -> None:
        (square,) = moments
        torch._foreach_mul_(square, ALPHA)
        torch._foreach_addcmul_(square, slopes, slopes, 1 - ALPHA)
        root = torch._foreach_sqrt(square)
        torch._foreach_add_(root, EPSILON)
        step = torch._foreach_div(slopes, root)
        torch._foreach_mul_(step, rates[0])
        torch._foreach_sub_(moved, step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copied into the tensors that are there. Raises ValueError if it is of another kind."""
        for own, saved in zip(self.moments, state["moments"], strict=True):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)
