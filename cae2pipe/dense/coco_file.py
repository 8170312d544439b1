"""COCO's instances files as various tools write them, converted to one form before training or scoring.

COCO's format leaves much open: types of ids, missing sizes and areas, three representations of masks. After
``read_instances`` ids count from 1, numbers are finite, and every object has a mask of its image's size.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeGuard

from cae2pipe.artifacts.digest import sha256_bytes
from cae2pipe.dense.orientation import is_upright, read_sides
from cae2pipe.errors import SourceError
from cae2pipe.runtime.foreign_names import told_apart

SIDES = ("width", "height")
LEAST = 6
"""Numbers of the shortest polygon: three points."""
FORMAT = "use a COCO instances file with images, annotations and categories"


Raw = dict[str, object]
"""An entry as written by a tool."""
Id = str | int | float


class RunLengths(TypedDict, total=False):
    """A mask in faster-coco-eval's packed form: ``size`` is (height, width). An empty dictionary: no pixel."""

    size: list[int]
    counts: bytes


class ImageEntry(TypedDict):
    """``id`` from 1; ``upright``: whether width and height refer to the image as viewers show it."""

    id: int
    file_name: str
    width: int
    height: int
    upright: bool


class ImageObject(TypedDict):
    """An annotation without its ids: ``bbox`` as four floats x, y, width, height, ``iscrowd`` as 0 or 1."""

    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: RunLengths


class Annotation(ImageObject):
    """``id`` from 1, ``category_id`` from 1: the position in ``Instances.classes``."""

    id: int
    image_id: int
    category_id: int


class Category(TypedDict):
    id: int
    name: str


class Dataset(TypedDict):
    """A whole file in the form that COCO's own tools take."""

    images: list[ImageEntry]
    annotations: list[Annotation]
    categories: list[Category]


@dataclass(frozen=True)
class ImageRow:
    """An image as listed in the file, with its original id. Missing sizes are None."""

    id: Id
    file_name: str
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Instances:
    """A file in the common form. ``classes``: unique names. ``left_out``: counts of the entries that were not used."""

    images: list[ImageEntry]
    annotations: list[Annotation]
    classes: list[str]
    left_out: dict[str, int]
    identity: str

    def dataset(self) -> Dataset:
        """The form that COCO's own tools take."""
        categories: list[Category] = [{"id": number, "name": name} for number, name in enumerate(self.classes, 1)]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def read_instances(path: Path, folder: Path, upright: bool | None, *, training: bool) -> Instances:
    """Read and check a whole file.

    Args:
        folder: of the images, whose headers are read. In ``training`` images without annotations are skipped and not in
        ``images``. upright: whether boxes refer to images as viewers show them, if an image's EXIF orientation leaves
        this open.

    An annotation becomes a crowd if its box has no extent or it has no mask (no segmentation, only polygons of fewer
    than three points, or no pixel inside the image): it is not used in training, and counts neither as detected nor as
    missed in scoring. An annotation with neither box nor mask is dropped.

    Raises:
        SourceError: an entry is invalid; the message names the annotation, image or category.
    """
    try:
        text = path.read_bytes()
        data = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"this is not JSON: {error}", where=path, fix=FORMAT) from None
    listed_images, listed, listed_categories = (
        entries_of(data, name, path) for name in ("images", "annotations", "categories")
    )
    left_out = Counter[str]()
    categories = numbered_categories(listed_categories, path)
    images = distinct_images(listed_images, path, left_out)
    if not listed:
        raise SourceError("there are no annotations", where=path, fix="add boxes and masks to train on")
    links = [
        checked_links(each, number, images, categories=categories, path=path) for number, each in enumerate(listed, 1)
    ]
    with_any = {image for image, _ in links}
    wanted = [each for each in images.values() if not training or each.id in with_any]
    left_out["images"] = len(images) - len(wanted)
    numbers: dict[Id, int] = {}
    entries: list[ImageEntry] = []
    paths = [folder / each.file_name for each in wanted]
    for number, (row, file, sides) in enumerate(zip(wanted, paths, read_sides(paths), strict=True), 1):
        numbers[row.id] = number
        size = None if row.width is None or row.height is None else (row.width, row.height)
        shown = is_upright(sides, size, upright, where=file, whose="the annotations")
        width, height = size or (sides.upright if shown else sides.stored)
        entries.append({"id": number, "file_name": row.file_name, "width": width, "height": height, "upright": shown})
    annotations: list[Annotation] = []
    for position, (each, (image, category)) in enumerate(zip(listed, links, strict=True), 1):
        number = numbers[image]
        content = normalised(each, position, entries[number - 1], path=path, left_out=left_out)
        if content:
            kind, _ = categories[category]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": kind, **content})
    return Instances(entries, annotations, [name for _, name in categories.values()], left_out, sha256_bytes(text))


def entries_of(data: object, name: str, path: Path) -> list[Raw]:
    """One of the file's lists. Raises SourceError if it is missing."""
    listed = data.get(name) if isinstance(data, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise SourceError(f"this is not a COCO instances file: there is no list {name!r}", where=path, fix=FORMAT)
    return listed


def numbered_categories(listed: Sequence[Raw], path: Path) -> dict[Id, tuple[int, str]]:
    """Maps each category's id to its number from 1, in the order of ids, and its name; repeated names include the
    id."""
    categories: list[tuple[Id, str]] = []
    for position, each in enumerate(listed, 1):
        number, name = each.get("id"), each.get("name")
        if not is_id(number) or not isinstance(name, str | int):
            raise SourceError(f"category {position} in the list has no id or no name", where=path, fix=FORMAT)
        categories.append((number, str(name)))
    categories.sort(key=lambda category: id_order(category[0]))
    if twice := [number for number, count in Counter(number for number, _ in categories).items() if count > 1]:
        raise SourceError(f"two categories have the id {twice[0]!r}", where=path, fix="use unique ids")
    names = told_apart([name for _, name in categories], [f"id {number}" for number, _ in categories])
    return {own: (number, name) for number, ((own, _), name) in enumerate(zip(categories, names, strict=True), 1)}


def distinct_images(listed: Sequence[Raw], path: Path, left_out: Counter[str]) -> dict[Id, ImageRow]:
    """Maps each original id to its image, in the order of ids; duplicate entries are counted."""
    rows: dict[Id, ImageRow] = {}
    files: dict[str, Id] = {}
    for each in sorted(listed, key=lambda each: id_order(each.get("id"))):
        row = checked_image(each, path)
        if row == rows.get(row.id):
            left_out["entries"] += 1
            continue
        if row.id in rows:
            raise SourceError(
                f"two images have the id {row.id!r}: {rows[row.id].file_name!r} and {row.file_name!r}",
                where=path,
                fix="use unique ids",
            )
        key = Path(row.file_name).as_posix()
        if key in files:
            raise SourceError(
                f"image {row.file_name!r} is listed with two ids, {files[key]!r} and {row.id!r}",
                where=path,
                fix="list it once",
            )
        rows[row.id], files[key] = row, row.id
    return rows


def checked_image(each: Raw, path: Path) -> ImageRow:
    """An image of the file. Raises SourceError if id, name or size are invalid."""
    number, name = each.get("id"), each.get("file_name")
    if not is_id(number):
        what = f"image {name!r} has no id" if number is None else f"the id of image {name!r} is {number!r}"
    elif not isinstance(name, str) or not name or "\0" in name:
        what = f"image {number!r} has no file name" if name is None else f"the file name of {number!r} is {name!r}"
    elif Path(name).is_absolute() or ".." in Path(name).parts:
        what = f"file name {name!r} points outside the folder"
    else:
        width, height = (checked_side(each.get(side), f"{side} of image {number!r}", path) for side in SIDES)
        return ImageRow(number, name, width, height)
    raise SourceError(what, where=path, fix=FORMAT)


def checked_side(value: object, what: str, path: Path) -> int | None:
    """A number of pixels, or None. Raises SourceError."""
    if value is None:
        return None
    if is_finite_number(value) and value >= 1 and value % 1 == 0:
        return int(value)
    raise SourceError(f"the {what} is {value!r}", where=path, fix="use a number of pixels")


def checked_links(
    each: Raw, position: int, images: Mapping[Id, object], *, categories: Mapping[Id, object], path: Path
) -> tuple[Id, Id]:
    """Image and category of an annotation. Raises SourceError if one of them is not listed."""
    image, category, which = each.get("image_id"), each.get("category_id"), called(each, position)
    if not is_id(image) or image not in images:
        what, fix = f"{which} refers to image {image!r}, which is not listed", "list it, or remove the annotation"
    elif not is_id(category) or category not in categories:
        what, fix = f"{which} refers to category {category!r}, which is not listed", "list the category"
    else:
        return image, category
    raise SourceError(what, where=path, fix=fix)


def normalised(
    each: Raw, position: int, image: ImageEntry, *, path: Path, left_out: Counter[str]
) -> ImageObject | None:
    """An annotation without its ids; None if it has neither a box nor a mask. Raises SourceError."""
    which, size = called(each, position), (image["width"], image["height"])
    box, crowd = checked_box(each.get("bbox"), which, image, path=path), each.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise SourceError(f"iscrowd of {which} is {crowd!r}", where=path, fix="use 0 or 1")
    runs, pixels = encoded(each.get("segmentation"), which, size, path=path, left_out=left_out)
    if not crowd and not (pixels and min(box[2:])):
        crowd, left_out["annotations"] = 1, left_out["annotations"] + 1
    if not min(box[2:]):
        if not pixels:
            return None
        box = extent(runs)
    elif not pixels:
        x, y, right, low = box[0], box[1], box[0] + box[2], box[1] + box[3]
        runs, _ = rasterised([[x, y, right, y, right, low, x, low]], size)
    given = each.get("area")
    area = float(given) if is_finite_number(given) and given >= 0 else float(pixels or box[2] * box[3])
    return {"bbox": box, "area": area, "iscrowd": int(bool(crowd)), "segmentation": runs}


def checked_box(box: object, which: str, image: ImageEntry, *, path: Path) -> list[float]:
    """Four floats x, y, width, height. Raises SourceError if they are not a box on the image."""
    width, height = image["width"], image["height"]
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite_number(value) for value in box):
        what = f"the box of {which} is {box!r}, not four finite numbers"
    else:
        x, y, w, h = (float(value) for value in box)
        inside = w >= 0 and h >= 0 and x < width and y < height and x + w >= 0 and y + h >= 0
        if inside and not beyond([x, y, x + w, y + h], (width, height)):
            return [x, y, w, h]
        what = f"the box {box} of {which} is outside image {image['file_name']!r}, {width} x {height}"
    raise SourceError(what, where=path, fix="use boxes x, y, width, height in pixels of the image")


def encoded(
    segmentation: object, which: str, size: tuple[int, int], *, path: Path, left_out: Counter[str]
) -> tuple[RunLengths, int]:
    """Run lengths {size, counts} of an annotation's mask, and its number of pixels; polygons of fewer than three points
    are ignored and counted.

    Args:
        size: (width, height) of the image.

    Raises:
        SourceError: it is neither polygons nor run lengths, or does not fit the image's size.
    """
    what = ""
    if isinstance(segmentation, dict):
        counts, stated = segmentation.get("counts"), segmentation.get("size")
        lengths = counts if isinstance(counts, list) else run_lengths(counts)
        if stated != [size[1], size[0]]:
            what = f"mask size mismatch in {which}: mask {stated!r} (height, width), image {[size[1], size[0]]}"
        elif not lengths or not all(isinstance(each, int) and each >= 0 for each in lengths):
            what = f"the mask of {which} has invalid run lengths"
        elif sum(lengths) != size[0] * size[1]:
            what = f"the run lengths of {which} cover {sum(lengths)} pixels, but its image has {size[0] * size[1]}"
        else:
            return from_lengths(lengths, size)
    elif isinstance(segmentation, list):
        polygons = [each for each in segmentation if isinstance(each, list) and len(each) >= LEAST]
        left_out["polygons"] += len(segmentation) - len(polygons)
        if not all(isinstance(each, list) and all(is_finite_number(value) for value in each) for each in segmentation):
            what = f"the segmentation of {which} is not a list of polygons of finite numbers x, y, x, y, ..."
        elif any(len(each) % 2 for each in polygons):
            what = f"a polygon of {which} has an odd number of coordinates"
        elif any(beyond(each, size) for each in polygons):
            what = f"a polygon of {which} is far outside its image of {size[0]} x {size[1]}"
        else:
            return rasterised(polygons, size)
    elif segmentation is None:
        return {}, 0
    else:
        what = f"the segmentation of {which} is neither polygons nor run lengths"
    raise SourceError(what, where=path, fix="use polygons [[x, y, x, y, ...]], or run lengths of the image's size")


def rasterised(polygons: list[list[float]], size: tuple[int, int]) -> tuple[RunLengths, int]:
    """Run lengths of polygons, and their number of pixels."""
    from faster_coco_eval.core import mask

    if not polygons:
        return {}, 0
    runs = mask.merge(mask.frPyObjects(polygons, size[1], size[0]))
    return runs, int(mask.area(runs))


def from_lengths(lengths: list[int], size: tuple[int, int]) -> tuple[RunLengths, int]:
    """Run lengths in faster-coco-eval's packed form, and their number of pixels."""
    from faster_coco_eval.core import mask

    return mask.frPyObjects({"size": [size[1], size[0]], "counts": lengths}, size[1], size[0]), sum(lengths[1::2])


def extent(runs: RunLengths) -> list[float]:
    """The bounding box of a mask: x, y, width, height."""
    from faster_coco_eval.core import mask

    box: list[float] = mask.toBbox(runs).tolist()
    return box


def run_lengths(packed: object) -> list[int]:
    """The numbers in COCO's packed run lengths: six bits per character, counted from "0", of which the highest means
    that more characters follow. From the third number on, differences to the number two before. Empty if the text is
    invalid."""
    if not isinstance(packed, str):
        return []
    lengths: list[int] = []
    value = shift = 0
    for char in packed:
        code = ord(char) - 48
        if not 0 <= code < 64 or shift > 60:
            return []
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return [] if shift else lengths


def called(each: Raw, position: int) -> str:
    """An annotation's name in errors: its original id, or its position in the list, from 1."""
    return f"annotation {each['id']!r}" if is_id(each.get("id")) else f"annotation {position} in the list"


def beyond(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether x, y, x, y, ... are outside an image by more than its width or height, which is not a rounding error."""
    return any(not -size[n % 2] <= value <= 2 * size[n % 2] for n, value in enumerate(coordinates))


def is_id(value: object) -> TypeGuard[Id]:
    """Whether it is a string, an integer of any size, or a finite float."""
    return (isinstance(value, str | int) and not isinstance(value, bool)) or is_finite_number(value)


def id_order(value: object) -> tuple[bool, Id]:
    """Sort key: numbers before strings."""
    return (True, str(value)) if isinstance(value, str) or not is_id(value) else (False, value)


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number. Python's JSON parser accepts Infinity, NaN and integers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)
