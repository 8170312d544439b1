"""Views with boxes and masks: every box stays the box of its mask."""

import random

import numpy as np
import pytest
from PIL import Image

from cae2pipe.config.dense import DetectSettings
from cae2pipe.dense.box_crops import cropped_objects, draw_box_crop, flipped_objects, padded, resized_objects
from cae2pipe.dense.coco import Objects


@pytest.fixture
def view() -> tuple[Image.Image, Objects]:
    """Two rectangles of different colours."""
    pixels, masks = np.zeros((80, 120, 3), np.uint8), np.zeros((2, 80, 120), np.uint8)
    boxes = np.array([[10, 20, 50, 60], [70, 8, 110, 40]], np.float32)
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        pixels[y1:y2, x1:x2, number] = 255
        masks[number, y1:y2, x1:x2] = 1
    return Image.fromarray(pixels), Objects(boxes, np.array([1, 2]), masks)


def agrees(image: Image.Image, objects: Objects) -> None:
    """Boxes enclose their masks, and masks their colour."""
    assert objects.masks.shape[1:] == (image.height, image.width)
    assert len(objects.boxes) == len(objects.labels) == len(objects.masks)
    for box, label, mask in zip(objects.boxes, objects.labels, objects.masks, strict=True):
        rows, cols = np.nonzero(mask)
        found = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        assert box == pytest.approx(found, abs=1.6)
        colour = np.asarray(image)[..., label - 1]
        assert (colour[mask > 0] > 127).mean() > 0.9


def test_each_change(view):
    agrees(*view)
    agrees(*flipped_objects(*view))
    agrees(*resized_objects(*view, (200, 60)))
    image, objects = cropped_objects(*view, left=30, top=30, width=50, height=40)
    assert objects.labels.tolist() == [1, 2]
    assert objects.boxes.tolist() == [[0, 0, 20, 30], [40, 0, 50, 10]]
    agrees(image, objects)
    assert cropped_objects(*view, left=0, top=62, width=60, height=18)[1].labels.tolist() == []


def test_twice_flipped_is_as_before(view):
    image, objects = flipped_objects(*flipped_objects(*view))
    assert np.array_equal(np.asarray(image), np.asarray(view[0]))
    assert np.array_equal(objects.boxes, view[1].boxes)
    assert np.array_equal(objects.masks, view[1].masks)


def test_drawn_views_have_the_sizes_asked_for(view):
    random.seed(0)
    settings = DetectSettings(short_sides=(48, 64), long_side=100, crop=0.7)
    for _ in range(40):
        image, objects = draw_box_crop(*view, settings)
        assert max(image.size) <= 100
        assert min(image.size) in (48, 64) or max(image.size) == 100
        agrees(image, objects)


def test_crops_may_miss_all_objects(view):
    """As with mmdetection's ``allow_negative_crop``."""
    random.seed(0)
    settings = DetectSettings(short_sides=(48,), long_side=100, crop=1.0, crop_range=(8, 60))
    counts = [len(draw_box_crop(*view, settings)[1].labels) for _ in range(40)]
    assert set(counts) == {0, 1, 2}


def test_padding_is_below_and_to_the_right():
    images = [np.full((30, 50, 3), 9, np.uint8), np.full((40, 20, 3), 7, np.uint8)]
    whole = padded(images, (1, 2, 3))
    assert whole.shape == (2, 3, 64, 64)
    assert (whole[0, :, :30, :50] == 9).all()
    assert (whole[1, :, :40, :20] == 7).all()
    assert (whole[1, :, 40:] == np.array([1, 2, 3])[:, None, None]).all()
