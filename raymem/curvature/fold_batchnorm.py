"""Eval-mode BatchNorm folded into the convolutions before it: the same function, fewer passes."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

FOLDED = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
# float32 rounds a deep net's logits by less than this of their size.
ROUNDING = 1e-4


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of `model` with Conv-BatchNorm pairs made one convolution, or `model` as it is.

    As it is, if it cannot be traced, has no such pair, or gives other logits for x than before:
    folding only saves time. The copy shares no weights with the model.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return model
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            from torch.fx.experimental.optimization import fuse

            if _called_twice(symbolic_trace(model)):
                return model
            copy: nn.Module = fuse(model).eval()
            same = all(_agree(model(part), copy(part)) for part in (x, x[:1]))
    except Exception:  # tracing runs the user's code on stand-ins, which can fail in any way
        return model
    return copy if same else model


def _called_twice(traced: GraphModule) -> bool:
    """A convolution or BatchNorm of two places cannot be folded in one of them."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    called = Counter(
        id(modules[node.target])
        for node in traced.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], FOLDED)
    )
    return max(called.values(), default=0) > 1


def _agree(a: Tensor, b: Tensor) -> bool:
    """To rounding, measured by each logit and by the middle of its row: outliers hide nothing."""
    size = (a - a.mean(1, keepdim=True)).abs().median(dim=1, keepdim=True).values
    return bool(((a - b).abs() <= ROUNDING * (a.abs() + size)).all())
