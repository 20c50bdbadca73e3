"""What must hold before a derivative means anything: eval mode, plain float arithmetic, labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raymem.errors import CurvatureError


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raises CurvatureError unless model, x [B, C, H, W] and y [B] can be differentiated."""
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise CurvatureError(
            f"{training[0]} is in training mode, where examples of a batch change each other; call "
            "model.eval()"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise CurvatureError(f"images are {x.dtype}; give float32 or float64 pixels in [0, 1]")
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise CurvatureError(
            f"images are {tuple(x.shape)} and labels {tuple(y.shape)}; give one label per image"
        )
    if y.dtype != torch.int64:
        raise CurvatureError(f"labels are {y.dtype}; give int64 class numbers")
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {x.dtype}
    if other:
        raise CurvatureError(
            f"images are {x.dtype} but the model has {other.pop()}; convert one with .to()"
        )


def check_logits(logits: Tensor, y: Tensor) -> None:
    """Raises CurvatureError unless logits are [B, K] with K > 1 and labels are below K."""
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(y):
        raise CurvatureError(
            f"the model gives {tuple(logits.shape)} for {len(y)} images; it must give logits "
            "[B, K] of two or more classes"
        )
    K = logits.shape[1]
    if len(y) and not bool(((y >= 0) & (y < K)).all()):
        raise CurvatureError(
            f"labels go from {int(y.min())} to {int(y.max())}, but the model has {K} classes"
        )


@contextlib.contextmanager
def plain_arithmetic(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Weights without gradients; no autocast, no TF32: real float32. Put back afterwards.

    TF32 convolutions, on by default on Ampere and later, ruin differences of gradients.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    tf32, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for parameter in wanted:
        parameter.requires_grad_(False)
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(precision)
        for parameter in wanted:
            parameter.requires_grad_(True)
