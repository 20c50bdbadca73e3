"""Rademacher probes that are a function of (seed, pixels): the same in any batch, on any device.

Signs are the bits of SplitMix64 (Steele, Lea & Flood 2014), keyed by a hash of the example.
Shapes: B batch, d values per example.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MIXED_IN = 0xD1B54A32D192ED03
BITS = 64


def keys_of(x: Tensor, seed: int) -> Tensor:
    """int64 [B]: a hash of each example's pixels (as float32) and of `seed`."""
    # Adding zero makes -0.0 and 0.0 one.
    bits = (x.detach().to(torch.float32).flatten(1) + 0.0).contiguous().view(torch.int32).long()
    place = _mix(torch.arange(1, bits.shape[1] + 1, device=x.device) * _signed(GOLDEN))
    return _mix((bits * (place | 1)).sum(1) + _signed(seed * MIXED_IN))


def signs(keys: Tensor, stream: int, n: int, dtype: torch.dtype) -> Tensor:
    """[B, n] of +1 and -1, for the keys [B] and the number of a stream.

    >>> keys = keys_of(torch.zeros(2, 1, 2, 2), seed=0)
    >>> signs(keys, 0, 3, torch.float32).shape
    torch.Size([2, 3])
    """
    n_words = math.ceil(n / BITS)
    count = torch.arange(1, n_words + 1, device=keys.device) + (stream << 32)
    words = _mix(keys[:, None] + count * _signed(GOLDEN))
    bits = (words[:, :, None] >> torch.arange(BITS, device=keys.device)) & 1
    return bits.flatten(1)[:, :n].to(dtype).mul_(2).sub_(1)


def image_signs(keys: Tensor, stream: int, x: Tensor) -> Tensor:
    """Signs in the shape of x [B, C, H, W]."""
    return signs(keys, stream, x[0].numel(), x.dtype).reshape(x.shape)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, in wrapping int64 arithmetic."""
    z = (z ^ _shift_right(z, 30)) * _signed(FIRST)
    z = (z ^ _shift_right(z, 27)) * _signed(SECOND)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, by: int) -> Tensor:
    """Logical: torch's shift of int64 keeps the sign."""
    return (z >> by) & ((1 << (BITS - by)) - 1)


def _signed(value: int) -> int:
    value %= 1 << BITS
    return value - (1 << BITS) if value >> (BITS - 1) else value
