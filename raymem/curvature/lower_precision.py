"""In which arithmetic the backward passes of a model may be taken: tried on its own examples.

A GPU takes products of TF32 (10 bits of mantissa) and bfloat16 (7) many times as fast as float32's
(23). Logits and their softmax stay float32: only the derivatives J of the logits are rounded, which
moves the trace by about the same share for every example. In bfloat16 the forward pass of J is
rounded as well, so that some ReLUs switch: how much that matters depends on the model.

The paper's score stays float32: it is the square of a difference of gradients a small step apart,
which is what rounding leaves least of (docs/decisions.md has the measured errors).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from raymem.curvature.trace import CurvatureRule, Precision, input_curvature

# The largest mean relative difference of the trace from float32's.
TOLERANCE = 1e-3
# Examples that are compared, drawn from a seed.
COMPARED = 64
# An example with less than this share of the mean trace is measured against that share: what is
# next to nothing has no relative error.
LEAST = 1e-3


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What the backward passes are taken in, and what it was chosen by."""

    precision: Precision = "float32"
    """float32, tf32 or bfloat16."""
    differences: dict[str, float] = field(default_factory=dict)
    """Of each precision that was tried: how far the trace is from float32's, see
    `relative_difference`."""


def pick_precision(
    model: nn.Module, x: Tensor, y: Tensor, rule: CurvatureRule, *, seed: int = 0
) -> PrecisionChoice:
    """The precision that `rule` asks for, if the trace of these examples allows it, else float32.

    x [B, C, H, W] and y [B]: a few of the model's own. `rule.mode` is not auto. TF32 is that of
    CUDA; elsewhere it is float32.
    """
    tried = _to_try(rule.precision, x.is_cuda)
    if not tried:
        return PrecisionChoice()
    full = _trace(model, x, y, rule, "float32", seed)
    differences = {
        name: relative_difference(_trace(model, x, y, rule, name, seed), full) for name in tried
    }
    good = [name for name in tried if differences[name] <= TOLERANCE]
    chosen = cast(Precision, good[0] if good else "float32")
    return PrecisionChoice(precision=chosen, differences=differences)


def _to_try(asked: Precision, cuda: bool) -> list[str]:
    """Fastest first."""
    if asked == "auto":
        return ["bfloat16", "tf32"] if cuda else []
    return [asked] if asked == "bfloat16" or (asked == "tf32" and cuda) else []


def _trace(
    model: nn.Module, x: Tensor, y: Tensor, rule: CurvatureRule, precision: str, seed: int
) -> Tensor:
    chosen = dataclasses.replace(rule, precision=cast(Precision, precision))
    return input_curvature(model, x, y, chosen, seed=seed).trace


def relative_difference(found: Tensor, full: Tensor) -> float:
    """Mean over examples of |found - full| / |full|, both [B].

    Examples with less than a thousandth of the mean of |full| are divided by that instead. NaN if
    one of the values is not finite.

    >>> relative_difference(torch.tensor([1.01, 2.0]), torch.tensor([1.0, 2.0]))
    0.005
    """
    size = full.double().abs()
    least = (LEAST * size.mean()).clamp(min=torch.finfo(torch.float64).tiny)
    found_in = (found.double() - full.double()).abs() / size.clamp(min=least)
    return round(float(found_in.mean()), 8)
