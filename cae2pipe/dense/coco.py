"""Images with boxes and masks, in COCO's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.errors import ImageError, SourceError
from cae2pipe.images.decode import decode_rgb

ANNOTATIONS = "annotations"
TRAIN, VAL = ("train2017", "train"), ("val2017", "val")


@dataclass(frozen=True)
class Objects:
    """What is on an image: boxes float32 (T, 4) as x1, y1, x2, y2, labels int64 (T,) from 1, masks uint8 (T, H, W)."""

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class CocoImages:
    """One part of the data; picklable. ``ids``: the categories' ids in the order of ``classes``, label 1 first.

    ``images`` are those that are read: in training those that have an object; ``left_out`` counts the others, and
    annotations without extent. ``annotations`` is the whole file, for scores.
    """

    root: Path
    images: list[dict[str, Any]]
    objects: dict[int, list[dict[str, Any]]]
    annotations: dict[str, Any]
    classes: list[str]
    ids: list[int]
    left_out: dict[str, int]
    identity: str

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """An image in RGB. Raises SourceError where it is missing, or of another size than the annotations say."""
        entry = self.images[index]
        path = self.root / entry["file_name"]
        try:
            # Boxes are those of the pixels as they are stored, whatever EXIF says of their orientation.
            image = decode_rgb(path.read_bytes(), where=path, upright=False)
        except OSError as error:
            raise SourceError(
                f"this image cannot be read: {error.strerror or error}", where=path, fix="bring it"
            ) from None
        except ImageError as error:
            raise SourceError(error.what, where=path, fix="replace it") from None
        if image.size != (entry["width"], entry["height"]):
            raise SourceError(
                f"the image has {image.width} x {image.height} pixels, and the annotations say {entry['width']} x "
                f"{entry['height']}",
                where=path,
                fix="give the images that the annotations were made for",
            )
        return image

    def read(self, index: int) -> tuple[Image.Image, Objects]:
        """An image and its objects; crowds are none."""
        from faster_coco_eval.core import mask

        entry = self.images[index]
        height, width = entry["height"], entry["width"]
        found = self.objects[entry["id"]]
        numbers = {identity: number for number, identity in enumerate(self.ids, 1)}
        masks = [decoded_mask(each["segmentation"], height, width, mask) for each in found]
        corners = np.array([each["bbox"] for each in found], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
        labels = np.array([numbers[each["category_id"]] for each in found], dtype=np.int64)
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=np.uint8)
        return self.image(index), Objects(boxes, labels, stacked)


def decoded_mask(segmentation: Any, height: int, width: int, mask: Any) -> np.ndarray:
    """A segmentation, polygons or run lengths, as uint8 (H, W)."""
    if isinstance(segmentation, list):
        encoded = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = mask.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    decoded: np.ndarray = mask.decode(encoded)
    return decoded


def open_coco(root: Path) -> tuple[CocoImages, CocoImages]:
    """Train and val of a folder laid out as COCO's: train2017, val2017, annotations/instances_*.json.

    Raises:
        SourceError: a part is missing, is not COCO's format, has no objects, or annotations do not fit their images.
    """
    train, val = (open_part(root, names, training) for names, training in ((TRAIN, True), (VAL, False)))
    if train.classes != val.classes:
        odd = sorted({*train.classes} ^ {*val.classes}) or train.classes
        raise SourceError(
            f"train and val have different categories: {odd[0]!r} is not in both, or in another place",
            where=root / ANNOTATIONS,
            fix="give both the same list of categories",
        )
    return train, val


def open_part(root: Path, names: tuple[str, ...], training: bool) -> CocoImages:
    """One part; in ``training`` without images that have no object."""
    name = next((name for name in names if (root / ANNOTATIONS / f"instances_{name}.json").is_file()), names[0])
    folder, path = root / name, root / ANNOTATIONS / f"instances_{name}.json"
    if missing := next((place for place in (path, folder) if not place.exists()), None):
        raise SourceError(
            "this is missing",
            where=missing,
            fix="give a folder with train2017/, val2017/ and annotations/instances_train2017.json, ..._val2017.json",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(data["categories"], key=lambda each: each["id"])
        images = {each["id"]: each for each in data["images"]}
        annotations = data["annotations"]
        checked = [(each["id"], each["image_id"], each["category_id"], each["bbox"]) for each in annotations]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"this is not COCO's instances format: {error!r}", where=path, fix="give images, annotations and categories"
        ) from None
    if not annotations:
        raise SourceError("there is not one annotation", where=path, fix="give boxes and masks to train on")
    known = {each["id"] for each in categories}
    for number, image, category, box in checked:
        check_annotation(number, image, category, box, images, known, path)
    for each in images.values():
        if Path(each["file_name"]).is_absolute() or ".." in Path(each["file_name"]).parts:
            raise SourceError(f"file name {each['file_name']!r} leads out of the folder", where=path, fix="mend it")
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    flat = 0
    for each in annotations:
        if each.get("iscrowd", 0):
            continue
        if min(each["bbox"][2:]) < 1 or not each.get("segmentation"):
            flat += 1
        else:
            objects[each["image_id"]].append(each)
    ordered = [images[number] for number in sorted(images)]
    read = [each for each in ordered if objects[each["id"]]] if training else ordered
    if not read:
        raise SourceError("not one image has an object that is no crowd", where=path, fix="check the annotations")
    return CocoImages(
        folder,
        read,
        objects,
        data,
        [each["name"] for each in categories],
        [each["id"] for each in categories],
        {"images": len(ordered) - len(read), "annotations": flat},
        fingerprint([[each["file_name"] for each in ordered], checked]),
    )


def check_annotation(
    number: Any, image: Any, category: Any, box: Any, images: dict[int, Any], categories: set[int], path: Path
) -> None:
    """Raise SourceError for an annotation that cannot be meant: its image or category is unknown, or its box lies
    outside the image."""
    if image not in images:
        what, fix = f"annotation {number} is of image {image}, which is not listed", "list it, or remove the annotation"
    elif category not in categories:
        what, fix = f"annotation {number} is of category {category}, which is not listed", "list the category"
    else:
        width, height = images[image]["width"], images[image]["height"]
        x, y, w, h = box
        if w >= 0 and h >= 0 and x < width and y < height and x + w >= 0 and y + h >= 0:
            return
        what = f"the box {box} of annotation {number} lies outside image {image}, {width} x {height}"
        fix = "give boxes as x, y, width, height in pixels of the image"
    raise SourceError(what, where=path, fix=fix)
