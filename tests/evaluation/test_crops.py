"""Random crops that are clipped to the image, held against the released code's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from cae2pipe.config.evaluate import DrawSettings
from cae2pipe.evaluation.crops import DrawnCrop, clipped_box
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.seeded import seeded

DRAWS = 2000
SHAPES = {(500, 375): (0.515, 0.124), (500, 500): (0.530, 0.202), (640, 300): (0.450, None)}
"""Mean share of the image and share of crops above 0.8, measured on 4,000 draws of the authors' code."""
CLIPPED = DrawSettings(clip=True)


def authors_box(width: int, height: int) -> tuple[int, int, int, int]:
    """As in ``linear_util/crop.py``: one draw of torch's, sides clipped."""
    target = width * height * torch.empty(1).uniform_(0.08, 1.0).item()
    low, high = torch.log(torch.tensor((3 / 4, 4 / 3)))
    aspect = torch.exp(torch.empty(1).uniform_(float(low), float(high))).item()
    w = min(round(math.sqrt(target * aspect)), width)
    h = min(round(math.sqrt(target / aspect)), height)
    return int(torch.randint(0, height - h + 1, (1,))), int(torch.randint(0, width - w + 1, (1,))), h, w


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_clipped_boxes_are_distributed_as_the_authors_are(width, height):
    from scipy.stats import ks_2samp

    torch.manual_seed(0)
    theirs = np.array([authors_box(width, height) for _ in range(DRAWS)], dtype=float)
    ours = np.array(
        [clipped_box(CLIPPED, keyed_uniforms(4, "box", n).tolist(), height, width=width) for n in range(DRAWS)],
        dtype=float,
    )
    for column in range(4):
        assert ks_2samp(theirs[:, column], ours[:, column]).pvalue > 0.01
    shares = ours[:, 2] * ours[:, 3] / (width * height)
    mean, large = SHAPES[width, height]
    assert shares.mean() == pytest.approx(mean, abs=0.02)
    if large is not None:
        assert (shares > 0.8).mean() == pytest.approx(large, abs=0.03)
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


def test_timms_crops_are_smaller():
    from timm.data.transforms import RandomResizedCropAndInterpolation

    image = Image.new("RGB", (500, 375))
    with seeded("timm"):
        boxes = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
    assert np.mean([h * w for _, _, h, w in boxes]) / (500 * 375) == pytest.approx(0.43, abs=0.02)


def test_a_box_by_hand():
    """Half the pixels of 300 x 100 at ratio 1 are 122 pixels high and wide."""
    settings = DrawSettings(clip=True, scale=(0.5, 0.5), ratio=(1, 1))
    assert clipped_box(settings, [0.3, 0.3, 0.9, 0.5], 100, width=300) == (0, 89, 100, 122)
    assert clipped_box(settings, [0.3, 0.3, 0.9, 0.5], 300, width=100) == (161, 0, 122, 100)
    assert clipped_box(CLIPPED, [0.0, 0.0, 0.0, 0.0], 1, width=1) == (0, 0, 1, 1)


def test_a_clipped_crop_shows_the_box_and_hangs_on_seed_epoch_and_key():
    pixels = np.random.default_rng(0).integers(0, 256, size=(30, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def crop(seed: int, epoch: int, key: int) -> np.ndarray:
        settings = DrawSettings(clip=True, flip=0.0, scale=(0.5, 0.5), ratio=(1, 1))
        return DrawnCrop(16, settings, (0.5, 0.5, 0.5), seed, epoch)(image, key)

    first = crop(1, 2, 3)
    assert np.array_equal(first, crop(1, 2, 3))
    others = [crop(0, 2, 3), crop(1, 0, 3), crop(1, 2, 0)]
    assert not any(np.array_equal(first, other) for other in others)
    # The box is as high as the image and 37 pixels wide, and lies somewhere along it.
    wanted = [
        image.crop((left, 0, left + 37, 30)).resize((16, 16), Image.Resampling.BICUBIC) for left in range(90 - 37 + 1)
    ]
    assert any(np.array_equal(first, np.asarray(one)) for one in wanted)
