"""Stored views at the smaller size of a student, with Pillow and, bit for bit alike, in batches on any device.

If the sizes divide, each pixel is the mean of a square of pixels; otherwise bicubic and antialiased like crops. Means
halve the time to load a view of 448 pixels for a student of 224, and are closer to a crop rendered at 224 than a JPEG
of 224 pixels is. libjpeg's own scaling would halve it again, but devices' decoders have none that gives the same pixels
(benchmarks/reduced_views.py).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cae2pipe.images.device_views import GROUP_BYTES, PRECISION_BITS, bicubic_taps
from cae2pipe.images.views import resize


def reduced_view(view: Image.Image, size: int) -> Image.Image:
    """A square view of at least ``size`` pixels at ``size`` x ``size``."""
    factor, rest = divmod(view.width, size)
    return resize(view, size, size) if rest else view.reduce(factor)


def reduced_views(views: Tensor, size: int) -> Tensor:
    """Views, uint8 (n, 3, H, H) with H >= size, at ``size`` pixels: uint8 (n, 3, size, size)."""
    side = views.shape[-1]
    factor, rest = divmod(side, size)
    if factor == 1 and not rest:
        return views
    # Sums take four bytes per value, before and after each step.
    at_once = max(1, GROUP_BYTES // (24 * side * side))
    if not rest:
        return torch.cat([_means(part, factor) for part in views.split(at_once)])
    index, scales = _taps(side, size, views.device)
    return torch.cat(
        [_weighted(_weighted(part, index, scales).mT, index, scales).mT for part in views.split(at_once)]
    ).contiguous()


def _means(views: Tensor, factor: int) -> Tensor:
    """The mean of each square of ``factor`` x ``factor`` pixels, rounded as in Pillow's Reduce.c."""
    count = factor * factor
    cells = views.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    sums = cells.sum(dim=(3, 5), dtype=torch.int64) + count // 2
    means: Tensor = (sums * (2**24 // count)) >> 24
    return means.to(torch.uint8)


@lru_cache(maxsize=8)
def _taps(side: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``bicubic_taps`` as indices, int64 (taps, size), and weights on a device: copied once, not with every batch."""
    first, weights = bicubic_taps(side, size)
    index = (first + np.arange(len(weights))[:, None]).clip(max=side - 1)
    return torch.from_numpy(index).to(device), torch.from_numpy(weights).to(device)


def _weighted(pixels: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums along the last axis of uint8 (..., m) at ``index``, int64 (taps, size), as in Pillow's Resample.c:
    uint8 (..., size)."""
    shape = (*pixels.shape[:-1], index.shape[1])
    total = torch.full(shape, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=pixels.device)
    for taps, weight in zip(index, weights, strict=True):
        total += pixels.index_select(-1, taps) * weight
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)
