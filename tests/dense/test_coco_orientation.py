"""Orientation of boxes on an image with an EXIF orientation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from cae2pipe.dense.coco import open_coco
from cae2pipe.errors import SourceError
from tests.dense.coco_files import write


def turned_picture(path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 255
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize(
    ("orientation", "stored", "stated", "upright", "light"),
    [
        (6, (24, 16), (24, 16), None, "stored"),
        (6, (24, 16), (16, 24), None, "upright"),
        (6, (24, 16), (16, 24), False, "upright"),  # the size is unambiguous
        (3, (24, 16), (24, 16), False, "stored"),
        (3, (24, 16), (24, 16), True, "upright"),
        (6, (24, 24), (24, 24), True, "upright"),
        (6, (24, 16), (None, None), True, "upright"),
        (1, (24, 16), (24, 16), None, "stored"),
        (3, (24, 16), (24, 16), None, "unknown whether the annotations refer .* EXIF orientation 3"),
        (6, (24, 24), (24, 24), None, "unknown whether the annotations refer .* EXIF orientation 6"),
        (6, (24, 16), (None, None), None, "unknown whether"),
        (6, (24, 16), (20, 20), None, "for 20 x 20 pixels, but the image has 24 x 16, or 16 x 24 if EXIF"),
    ],
)
def test_the_size_says_which_way_up_boxes_see_an_image(orientation, stored, stated, upright, light, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    turned_picture(folder / "1.jpg", orientation, stored)
    image = {"id": 1, "file_name": "1.jpg", "width": stated[0], "height": stated[1]}
    one = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    text = json.dumps({"images": [image], "annotations": [one], "categories": [{"id": 1, "name": "a"}]})
    (tmp_path / "coco").mkdir()
    root = write(tmp_path / "coco", folder, text, text)
    if light not in ("stored", "upright"):
        with pytest.raises(SourceError, match=light) as caught:
            open_coco(root, upright)
        assert "1.jpg" in str(caught.value.where)
        return
    picture, objects = open_coco(root, upright)[1].read(0)
    # A quarter turn to the right moves the light quarter from the upper left to the upper right corner, a half turn to
    # the lower right one.
    corner = {"stored": (2, 2), 3: (picture.width - 3, picture.height - 3), 6: (picture.width - 3, 2)}
    assert picture.getpixel(corner["stored" if light == "stored" else orientation])[0] > 200
    assert objects.masks[0].shape == (picture.height, picture.width)
