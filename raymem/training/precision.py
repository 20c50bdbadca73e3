"""In which arithmetic: so many threads, denormals flushed, and float32 that is float32.

What a process or a library set before is put back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from raymem.curvature.input_checks import float32_products
from raymem.training.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def fast_arithmetic(threads: int) -> Iterator[None]:
    """So many threads, denormals flushed to zero, float32 in full, and convolutions that give the
    same bits each time; put back afterwards."""
    threads_before, flushed_before = torch.get_num_threads(), _flushes_denormals()
    deterministic_before = torch.backends.cudnn.deterministic
    torch.set_num_threads(threads)
    # Models that memorize drive gradients into denormals: 10 to 100 times slower on CPUs.
    torch.set_flush_denormal(True)
    # By itself cuDNN adds up weight gradients of float32 in any order.
    torch.backends.cudnn.deterministic = True
    try:
        with float32_products(tf32=False):
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(flushed_before)
        torch.backends.cudnn.deterministic = deterministic_before


def products_of(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What training by `recipe` computes float32 products in."""
    return float32_products(tf32=recipe.precision == "tf32" and device.type == "cuda")


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """Of one model's forward pass. Casts are not kept: a CUDA graph would keep those of the step
    that was captured."""
    dtype = DTYPES.get(recipe.precision)
    return torch.autocast(
        device.type, dtype=dtype or torch.float32, enabled=dtype is not None, cache_enabled=False
    )


def _flushes_denormals() -> bool:
    """torch can set this state of the thread, but not tell it."""
    return bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 == 0)
