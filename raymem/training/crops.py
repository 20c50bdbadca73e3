"""Random resized crops of whole batches: two matrix products with each image's own filter.

Shapes: B batch, H x W pixels, C channels, S side of the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Candidates drawn per image; the first that lies inside the image is taken, else the centre.
CANDIDATES = 10


def random_boxes(
    B: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: torch.Generator,
) -> Tensor:
    """Boxes (top, left, height, width) in whole pixels, int64 [B, 4], as torchvision draws them.

    Of each box the share of the image's area is uniform in `scale`, and the logarithm of width over
    height in `ratio`'s; ten such are drawn, and the first that fits is put anywhere. If none fits,
    the largest centred box with the nearest allowed shape is taken (Szegedy et al. 2015).

    >>> draws = torch.Generator().manual_seed(0)
    >>> boxes = random_boxes(1000, (32, 32), (0.25, 1.0), (3 / 4, 4 / 3), draws)
    >>> area = boxes[:, 2] * boxes[:, 3] / 32**2
    >>> bool(area.min() > 0.2), bool(area.max() <= 1)
    (True, True)
    """
    H, W = size
    area = torch.empty(B, CANDIDATES).uniform_(*scale, generator=draws) * (H * W)
    shape = torch.empty(B, CANDIDATES)
    shape = shape.uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=draws).exp()
    place = torch.rand(B, 2, generator=draws)
    width, height = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (width >= 1) & (height >= 1) & (width <= W) & (height <= H)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    spare_h, spare_w = _largest(H, W, ratio)
    height = torch.where(found, height.gather(1, first)[:, 0], float(spare_h))
    width = torch.where(found, width.gather(1, first)[:, 0], float(spare_w))
    # torch.rand is below 1, so that all H - height + 1 places are equally likely.
    top = torch.where(found, (place[:, 0] * (H - height + 1)).floor(), ((H - height) / 2).floor())
    left = torch.where(found, (place[:, 1] * (W - width + 1)).floor(), ((W - width) / 2).floor())
    return torch.stack([top, left, height, width], 1).long()


def _largest(H: int, W: int, ratio: tuple[float, float]) -> tuple[int, int]:
    shape = W / H
    if shape < ratio[0]:
        return round(W / ratio[0]), W
    return (H, round(H * ratio[1])) if shape > ratio[1] else (H, W)


def resized_crops(x: Tensor, boxes: Tensor, S: int, flipped: Tensor | None = None) -> Tensor:
    """Each image's box, resized to S x S, antialiased and bilinear; float32 [B, S, S, C], 0 to 255.

    x: uint8 [B, H, W, C]; boxes: int64 [B, 4]; flipped: bool [B], mirrored left to right. The same
    as cutting the box out and resizing it by torchvision's or Pillow's antialiased bilinear filter,
    without rounding to whole grey values.
    """
    images = x.permute(0, 3, 1, 2).to(torch.float32)
    boxes = boxes.to(x.device)
    rows = _filter(boxes[:, 0], boxes[:, 2], x.shape[1], S)
    columns = _filter(boxes[:, 1], boxes[:, 3], x.shape[2], S)
    if flipped is not None:
        columns = torch.where(flipped.to(x.device)[:, None, None], columns.flip(1), columns)
    result = rows[:, None] @ images @ columns.transpose(1, 2)[:, None]
    return result.permute(0, 2, 3, 1)


def _filter(start: Tensor, length: Tensor, size: int, S: int) -> Tensor:
    """[B, S, size]: how much of each pixel of a line is in each pixel of the resized part."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / S
    reach = step.clamp(min=1)
    pixel = torch.arange(size, device=start.device) + 0.5
    centre = start + (torch.arange(S, device=start.device)[:, None] + 0.5) * step
    weight = (1 - (pixel - centre).abs() / reach).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(2, keepdim=True)
