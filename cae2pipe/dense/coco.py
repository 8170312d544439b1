"""Images with boxes and masks, in COCO's format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cae2pipe.dense.coco_file import Annotation, Dataset, ImageEntry, read_instances
from cae2pipe.dense.orientation import times
from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.runtime.wording import counted

ANNOTATIONS = "annotations"
TRAIN, VAL = ("train2017", "train"), ("val2017", "val")


@dataclass(frozen=True)
class Objects:
    """Objects of an image: boxes float32 (T, 4) as x1, y1, x2, y2, labels int64 (T,) from 1, masks uint8 (T, H, W)."""

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class CocoImages:
    """One part of the data; picklable.

    ``images`` are the images to read; in training only those with an object. ``objects`` are theirs, by image id,
    without crowds and objects less than a pixel wide. ``dataset`` is the whole file for scoring, in the form of
    ``Instances``: a category's id is its label. ``left_out`` counts the other entries of the file.
    """

    root: Path
    images: list[ImageEntry]
    objects: dict[int, list[Annotation]]
    dataset: Dataset
    classes: list[str]
    left_out: dict[str, int]
    identity: str

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """An image in RGB. Raises SourceError if it is missing, cannot be decoded, or has changed its size."""
        entry = self.images[index]
        path = self.root / entry["file_name"]
        try:
            image = decode_rgb(path.read_bytes(), where=path, upright=entry["upright"])
        except OSError as error:
            raise SourceError(
                f"this image cannot be read: {error.strerror or error}", where=path, fix="add it, or make it readable"
            ) from None
        except ImageError as error:
            raise SourceError(error.what, where=path, fix="replace it") from None
        if image.size != (entry["width"], entry["height"]):
            raise SourceError(
                f"the image has changed from {entry['width']} x {entry['height']} to {times(image.size)} pixels",
                where=path,
                fix="do not change images during a run",
            )
        return image

    def read(self, index: int) -> tuple[Image.Image, Objects]:
        """An image and its objects without crowds."""
        from faster_coco_eval.core import mask

        entry = self.images[index]
        height, width = entry["height"], entry["width"]
        own = self.objects[entry["id"]]
        masks = [mask.decode(each["segmentation"]) for each in own]
        corners = np.array([each["bbox"] for each in own], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
        labels = np.array([each["category_id"] for each in own], dtype=np.int64)
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.uint8)
        return self.image(index), Objects(boxes, labels, stacked)


def open_coco(root: Path, upright: bool | None = None) -> tuple[CocoImages, CocoImages]:
    """Train and val of a folder in COCO's layout: train2017, val2017, annotations/instances_*.json.

    Args:
        upright: whether boxes refer to images as viewers show them, if their sizes leave this open.

    Raises:
        SourceError: a part is missing, is not in COCO's format, has no objects, or annotations do not fit their images.
    """
    train, val = (
        open_coco_part(root, names, upright, training=training) for names, training in ((TRAIN, True), (VAL, False))
    )
    if train.classes != val.classes:
        odd = sorted({*train.classes} ^ {*val.classes}) or train.classes
        raise SourceError(
            f"train and val have different categories: {odd[0]!r} is not in both, or at a different position",
            where=root / ANNOTATIONS,
            fix="use the same list of categories in both",
        )
    return train, val


def open_coco_part(root: Path, names: tuple[str, ...], upright: bool | None, *, training: bool) -> CocoImages:
    """One part; in ``training`` without images that have no objects."""
    name = next((name for name in names if (root / ANNOTATIONS / f"instances_{name}.json").is_file()), names[0])
    folder, path = root / name, root / ANNOTATIONS / f"instances_{name}.json"
    needed = ((path, path.is_file()), (folder, folder.is_dir()))
    if missing := next((each for each, there in needed if not there), None):
        raise SourceError(
            "this file or folder is missing",
            where=missing,
            fix="use a folder with train2017/, val2017/ and annotations/instances_train2017.json, ..._val2017.json",
        )
    instances = read_instances(path, folder, upright, training=training)
    objects: dict[int, list[Annotation]] = {each["id"]: [] for each in instances.images}
    left_out = Counter(instances.left_out)
    for each in instances.annotations:
        if each["iscrowd"]:
            continue
        if min(each["bbox"][2:]) < 1:
            left_out["narrow"] += 1
        else:
            objects[each["image_id"]].append(each)
    read = [each for each in instances.images if objects[each["id"]]] if training else instances.images
    if not any(objects.values()):
        raise SourceError(
            "no annotation has a box and a mask and iscrowd=0; nothing to train on", where=path, fix="check the file"
        )
    left_out["images"] += len(instances.images) - len(read)
    return CocoImages(folder, read, objects, instances.dataset(), instances.classes, dict(left_out), instances.identity)


LEFT_OUT = {
    "entries": ("image", "listed twice: one entry used"),
    "images": ("image", "without objects: not used in training"),
    "narrow": ("annotation", "less than a pixel wide: not used in training"),
    "annotations": ("annotation", "without extent or with an empty mask: used neither in training nor in scoring"),
    "polygons": ("polygon", "of fewer than three points: ignored"),
}
"""What the counters in ``left_out`` count."""


def told_left_out(part: str, left_out: dict[str, int]) -> list[str]:
    """Log lines about what was left out of a part, if anything."""
    return [
        f"{part}: {counted(left_out[name], one)} {what}" for name, (one, what) in LEFT_OUT.items() if left_out.get(name)
    ]
