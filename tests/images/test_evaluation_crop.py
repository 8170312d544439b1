"""The crop of evaluations is torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cae2pipe.images.evaluation_crop import evaluation_crop


@pytest.mark.parametrize(
    ("width", "height"), [(50, 40), (40, 50), (500, 375), (333, 500), (256, 256), (256, 300), (257, 1001), (9, 9)]
)
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37), (24, 24)])
def test_it_agrees_with_torchvision_bit_for_bit(width, height, size, resize):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    noise = np.random.default_rng(width).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = Compose([Resize(resize, InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    ours = evaluation_crop(image, size, resize)
    assert ours.size == (size, size)
    assert ours.tobytes() == theirs.tobytes()


def test_the_centre_is_taken():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    assert evaluation_crop(image, 100, 100).tobytes() == Image.new("RGB", (100, 100), "blue").tobytes()
