"""Features within boxes: the maps of boxes, and positions to the pixel."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from cae2pipe.dense.pooling import BoxPool, level_of
from cae2pipe.dense.rcnn import StrideAnchors

BOXES = torch.tensor(
    [[8.0, 8, 40, 56], [60, 20, 180, 150], [20, 30, 250, 260], [0, 0, 448, 448], [101.5, 33.25, 107, 39]]
)


def maps(strides: tuple[float, ...], side: int = 448) -> OrderedDict[str, torch.Tensor]:
    """Maps of two images whose first channel is the x of each cell's centre in pixels, the second its y."""
    found = OrderedDict()
    for number, stride in enumerate(strides):
        centres = (torch.arange(round(side / stride)) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        found[str(number)] = torch.stack([torch.stack([x, y]), torch.stack([-x, -y])])
    return found


@pytest.mark.parametrize("patch", [16, 14])
def test_features_come_from_their_place(patch):
    """RoIAlign of a linear map gives the centre of each bin. Unaligned it would be half a cell off; and with strides of
    3.5 to 28 pixels taken for 4 to 32, up to an eighth of the image."""
    strides = tuple(patch * share for share in (0.25, 0.5, 1, 2))
    side = 7
    inside = BOXES.clamp(min=strides[-1] / 2, max=448 - strides[-1] / 2)  # outside of all centres nothing is linear
    found = BoxPool(side, strides)(maps(strides), [inside[:2], inside[2:]])
    bins = (torch.arange(side) + 0.5) / side
    x = inside[:, :1] + bins * (inside[:, 2:3] - inside[:, :1])
    y = inside[:, 1:2] + bins * (inside[:, 3:] - inside[:, 1:2])
    sign = torch.tensor([1, 1, -1, -1, -1])[:, None, None]
    torch.testing.assert_close(found[:, 0], sign * x[:, None].expand(-1, side, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, 1], sign * y[:, :, None].expand(-1, -1, side), atol=1e-3, rtol=0)


def test_each_box_is_torchvision_s_aligned_roi_on_its_map():
    strides = (4.0, 8.0, 16.0, 32.0)
    draw = torch.Generator().manual_seed(0)
    features = OrderedDict(
        (str(number), torch.randn(1, 3, round(448 / stride), round(448 / stride), generator=draw))
        for number, stride in enumerate((*strides, 64.0))
    )
    found = BoxPool(14, strides)(features, [BOXES])
    wanted_levels = LevelMapper(2, 5)([BOXES])
    assert level_of(BOXES, 4, 4).tolist() == wanted_levels.tolist() == [0, 1, 2, 3, 0]
    for box, level, own in zip(BOXES, wanted_levels.tolist(), found, strict=True):
        (wanted,) = roi_align(features[str(level)], [box[None]], 14, 1 / strides[level], -1, True)
        torch.testing.assert_close(own, wanted)


def test_without_boxes():
    assert BoxPool(7, (4.0, 8.0))(maps((4.0, 8.0)), [torch.zeros(0, 4)] * 2).shape == (0, 2, 7, 7)


def test_anchors_lie_at_multiples_of_the_stride():
    """Of an image of 96 pixels the maps at strides 32 and 64 have 3 and 2 cells."""
    from torchvision.models.detection.image_list import ImageList

    sides = [24, 12, 6, 3, 2]
    image = ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    (anchors,) = StrideAnchors((4, 8, 16, 32, 64))(image, [torch.zeros(1, 1, side, side) for side in sides])
    own = anchors[-12:].view(2, 2, 3, 4)
    centres = (own[..., :2] + own[..., 2:]) / 2
    assert centres[0, 1, 0].tolist() == [64, 0]
    assert centres[1, 0, 2].tolist() == [0, 64]
