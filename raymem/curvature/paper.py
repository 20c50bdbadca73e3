"""The curvature score of the paper and of its published scripts, with all their variants.

It is not an estimate of tr H: on a smooth net it tends to h^2 tr(H^2) as h falls, and on a ReLU net
at a finite step it measures how much the gradient jumps between linear pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymem.curvature.input_checks import check_inputs, differentiable, plain_arithmetic
from raymem.curvature.probes import image_signs, keys_of
from raymem.errors import CurvatureError
from raymem.settings import Setting

PAPER_STREAM = 3 << 20


@dataclass(frozen=True, kw_only=True)
class PaperRule:
    """The paper's curvature score: eq. 14 of Ravikumar et al. 2024, and variants of its scripts.

    Raises CurvatureError for settings that make no sense.

    As in the published scripts, which feed batches of 1,024 and leave the mean over the batch in:

    >>> PaperRule(norm="first-power", batch_divisor=1024).step
    0.001
    """

    step: float = 1e-3
    """Step h, in units of [0, 1] pixels; in float32, 1e-3 to 1e-4 is safe at 8x8, about 1e-4 at
    32x32."""
    probes: Annotated[int, Setting(least=1)] = 10
    """Number n of Rademacher probes."""
    norm: Literal["squared", "first-power"] = "squared"
    """Norm of the gradient's change: squared as in the equation, or first-power as in the published
    scripts."""
    temperature: float = 1.0
    """Temperature that divides the logits before the loss."""
    labels: Literal["true", "predicted"] = "true"
    """Loss of the true label, or of the class that the model predicts."""
    batch_divisor: int = 1
    """Number that divides the gradients; the batch size repeats scripts that take the mean over a
    batch."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be finite and > 0, got {getattr(self, name)}"
            for name in ("step", "probes", "temperature", "batch_divisor")
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name)))
        ]
        if self.norm not in ("squared", "first-power"):
            wrong.append(f"no norm {self.norm!r}; take squared or first-power")
        if self.labels not in ("true", "predicted"):
            wrong.append(f"no labels {self.labels!r}; take true or predicted")
        if wrong:
            raise CurvatureError("; ".join(wrong))


def paper_score(
    model: nn.Module, x: Tensor, y: Tensor, rule: PaperRule | None = None, *, seed: int = 0
) -> Tensor:
    """(1/n) sum_k |d/dx L(x + h v_k) - d/dx L(x)|^2, [B]: eq. 14 of Ravikumar et al. 2024.

    *Not* divided by h^2. L is the summed cross entropy, v_k are Rademacher. The gradient at x is
    computed once. model: logits [B, K], in eval mode. x: [B, C, H, W], float. y: int64 [B].

    Raises CurvatureError for a model in training mode, and wrong types and shapes.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    >>> paper_score(net, torch.rand(2, 1, 2, 2), torch.tensor([0, 2])).shape
    torch.Size([2])
    """
    rule = rule or PaperRule()
    check_inputs(model, x, y)
    with plain_arithmetic(model, x):
        keys = keys_of(x, seed)
        if rule.labels == "predicted":
            with torch.no_grad():
                y = model(x.detach().clone()).argmax(1)
        base = _gradient(model, x, y, rule)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for k in range(rule.probes):
            moved = x.detach() + rule.step * image_signs(keys, PAPER_STREAM + k, x)
            length = (_gradient(model, moved, y, rule) - base).flatten(1).square().sum(1)
            total += length if rule.norm == "squared" else length.sqrt()
    return total / rule.probes


def _gradient(model: nn.Module, x: Tensor, y: Tensor, rule: PaperRule) -> Tensor:
    logits, at = differentiable(model, x, y)
    loss = F.cross_entropy(logits / rule.temperature, y, reduction="sum") / rule.batch_divisor
    (found,) = torch.autograd.grad(loss, at)
    return found
