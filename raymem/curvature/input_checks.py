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
    shared = [
        name or type(m).__name__
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
    ]
    if shared:
        raise CurvatureError(
            f"{shared[0]} keeps no running statistics, so examples of a batch change each other; "
            "train with track_running_stats=True, or take another normalization"
        )
    if len(x) == 0:
        raise CurvatureError("there is no image; give one or more")
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
    if not isinstance(logits, Tensor):
        raise CurvatureError(f"the model gives {type(logits).__name__}; it must give logits [B, K]")
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(y):
        raise CurvatureError(
            f"the model gives {tuple(logits.shape)} for {len(y)} images; it must give logits "
            "[B, K] of two or more classes"
        )
    K = logits.shape[1]
    # A CUDA graph cannot ask; it is captured after batches that could.
    captured = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    if len(y) and not captured and not bool(((y >= 0) & (y < K)).all()):
        raise CurvatureError(
            f"labels go from {int(y.min())} to {int(y.max())}, but the model has {K} classes"
        )


def differentiable(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with their graph, and the copy of x that they came from.

    Raises CurvatureError for logits of another shape, and for those that do not depend on x.
    """
    at = x.detach().clone().requires_grad_()
    # Another copy, so that a layer may work in place.
    logits = model(at.clone())
    check_logits(logits, y)
    if not logits.requires_grad:
        raise CurvatureError(
            "the model's logits cannot be differentiated in the pixels: they are constant, or "
            "computed under no_grad; take that out of its forward"
        )
    return logits, at


@contextlib.contextmanager
def plain_arithmetic(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Weights without gradients; no autocast, no TF32: real float32. Put back afterwards.

    TF32 convolutions, on by default on Ampere and later, ruin differences of gradients.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with (
            float32_products(tf32=False),
            torch.inference_mode(False),
            torch.autocast(x.device.type, enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 in full, or in TF32 on GPUs that have it.

    torch by itself lets cuDNN's convolutions use TF32, and matrix products not.
    """
    products, convolutions = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
