"""A small data set in COCO's format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 48, 32


BOX = (16, 12)


PLACES = [[(2, 3), (26, 15)], [(20, 8)], [(5, 18), (29, 2)]]
"""Upper left corners of the rectangles of each image, the first red, the second blue."""


Data = dict[str, Any]


def corners(x: int, y: int) -> list[int]:
    return [x, y, x + BOX[0], y, x + BOX[0], y + BOX[1], x, y + BOX[1]]


def plain() -> Data:
    """The same for train and val."""
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2, 3)]
    annotations = [
        {"id": 0, "image_id": n, "category_id": category, "bbox": [*place, *BOX], "area": math.prod(BOX), "iscrowd": 0,
         "segmentation": [corners(*place)]}
        for n, places in enumerate(PLACES, 1) for category, place in enumerate(places, 1)
    ]  # fmt: skip
    for number, each in enumerate(annotations, 1):
        each["id"] = number
    return {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}],
    }


def write(root: Path, pictures: Path, train: str, val: str) -> Path:
    (root / "annotations").mkdir()
    for part, text in (("train2017", train), ("val2017", val)):
        (root / part).symlink_to(pictures)
        (root / "annotations" / f"instances_{part}.json").write_text(text)
    return root
