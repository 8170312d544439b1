"""Features within boxes, from maps of several strides (RoIAlign)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

CELLS = 14
"""Boxes with a side of less than twice as many cells of the first map are pooled from it: 112 pixels at a stride of
4."""


def level_of(boxes: Tensor, stride: float, levels: int) -> Tensor:
    """The map for each box (P, 4), int64 (P,): one further for every doubling of its side (FPN, equation 1).

    Args:
        stride: of the first map. levels: number of maps.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return torch.log2(side / (CELLS * stride) + 1e-6).floor().clamp(0, levels - 1).long()


class BoxPool(nn.Module):
    """RoIAlign as in mmcv: ``aligned``, so that features are not shifted by half a cell, and with as many samples as a
    box has cells. torchvision's ``MultiScaleRoIAlign`` does neither, and takes strides to be powers of two.

    Args:
        side: of the result, in cells. strides: of the maps, in pixels.
    """

    def __init__(self, side: int, strides: Sequence[float]):
        super().__init__()
        self.side, self.strides = side, tuple(strides)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Features (P, C, side, side) of all boxes of a batch, image by image.

        Args:
            features: maps (B, C, h, w); those after the last stride are not read. boxes: (P, 4) of each image, in
            pixels.
        """
        own = torch.cat(boxes)
        image = torch.cat([each.new_full((len(each), 1), number) for number, each in enumerate(boxes)])
        level = level_of(own, self.strides[0], len(self.strides))
        maps = list(features.values())
        pooled = maps[0].new_zeros(len(own), maps[0].shape[1], self.side, self.side)
        for number, (found, stride) in enumerate(zip(maps, self.strides, strict=False)):
            chosen = (level == number).nonzero().flatten()
            within = torch.cat([image[chosen], own[chosen]], dim=1)
            pooled[chosen] = roi_align(found, within, self.side, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled
