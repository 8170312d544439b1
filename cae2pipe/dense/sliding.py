"""Logits of an image of any size from windows of a fixed size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows along a side of ``length``: every ``stride``, the last window aligned with the end."""
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(number * stride, length - window) for number in range(count)]


def sliding_logits(
    logits: Callable[[Tensor], Tensor], image: Tensor, window: int, *, stride: int, batch: int, fill: Tensor
) -> Tensor:
    """The mean over windows of the logits at every pixel.

    Args:
        logits: function from images (b, 3, window, window) to (b, C, window, window).
        image: (3, H, W). A side shorter than the window is padded with ``fill`` (3,), below and to the right.
        window, stride: in pixels. batch: windows per forward pass.

    Returns:
        (C, H, W).
    """
    height, width = image.shape[-2:]
    below, right = max(0, window - height), max(0, window - width)
    padded = F.pad(image, (0, right, 0, below))
    if below or right:
        padded[:, height:], padded[:, :, width:] = fill.view(3, 1, 1), fill.view(3, 1, 1)
    corners = [
        (top, left)
        for top in window_starts(padded.shape[1], window, stride)
        for left in window_starts(padded.shape[2], window, stride)
    ]
    total: Tensor | None = None
    seen = torch.zeros(padded.shape[-2:], device=image.device)
    for low in range(0, len(corners), batch):
        some = corners[low : low + batch]
        scored = logits(torch.stack([padded[:, top : top + window, left : left + window] for top, left in some]))
        if total is None:
            total = scored.new_zeros(scored.shape[1], *padded.shape[-2:], dtype=torch.float32)
        for (top, left), own in zip(some, scored, strict=True):
            total[:, top : top + window, left : left + window] += own
            seen[top : top + window, left : left + window] += 1
    assert total is not None
    return (total / seen)[:, :height, :width]
