"""COCO's instances files from various tools: a perfect detector scores 1, or the file is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cae2pipe.dense.average_precision import average_precision
from cae2pipe.dense.coco import CocoImages, open_coco
from cae2pipe.dense.coco_file import run_lengths
from cae2pipe.errors import SourceError
from tests.dense.coco_files import BOX, HEIGHT, PLACES, WIDTH, Data, corners, plain, write


def perfect(val: CocoImages) -> list[dict[str, Any]]:
    """Detections of all rectangles, independent of the file."""
    numbers = {Path(each["file_name"]).name: each["id"] for each in val.dataset["images"]}
    return [
        {"image_id": numbers[f"{n}.png"], "category_id": label, "score": 1.0, "bbox": [*place, *BOX],
         "segmentation": mask.frPyObjects([corners(*place)], HEIGHT, WIDTH)[0]}
        for n, places in enumerate(PLACES, 1) for label, place in enumerate(places, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for n, places in enumerate(PLACES, 1):
        pixels = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
        for (x, y), colour in zip(places, ((220, 30, 30), (30, 30, 220)), strict=False):
            pixels[y : y + BOX[1], x : x + BOX[0]] = colour
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def each_annotation(**values: Any) -> Callable[[Data], None]:
    """Set, or with ``...`` remove, fields of all annotations; functions get the annotation's number, from 0."""
    return lambda data: change(data["annotations"], values)


def first(**values: Any) -> Callable[[Data], None]:
    return lambda data: change(data["annotations"][:1], values)


def each_image(**values: Any) -> Callable[[Data], None]:
    return lambda data: change(data["images"], values)


def change(entries: list[dict[str, Any]], values: dict[str, Any]) -> None:
    for number, entry in enumerate(entries):
        for name, value in values.items():
            if value is ...:
                del entry[name]
            else:
                entry[name] = value(number) if callable(value) else value


def ids(images: Callable[[int], Any] = int, categories: Callable[[int], Any] = int) -> Callable[[Data], None]:
    def renumber(data: Data) -> None:
        for each in data["images"]:
            each["id"] = images(each["id"])
        for each in data["categories"]:
            each["id"] = categories(each["id"])
        for each in data["annotations"]:
            each["image_id"], each["category_id"] = images(each["image_id"]), categories(each["category_id"])

    return renumber


def more(name: str, *entries: dict[str, Any]) -> Callable[[Data], None]:
    """Add copies of the first entry with other values."""
    return lambda data: data[name].extend({**data[name][0], **entry} for entry in entries)


def dense(place: tuple[int, int]) -> np.ndarray:
    return mask.decode(mask.frPyObjects([corners(*place)], HEIGHT, WIDTH)[0])


def packed(place: tuple[int, int] = PLACES[0][0], **over: Any) -> dict[str, Any]:
    runs = mask.encode(np.asfortranarray(dense(place)))
    return {"size": runs["size"], "counts": runs["counts"].decode(), **over}


def lengths(place: tuple[int, int] = PLACES[0][0], **over: Any) -> dict[str, Any]:
    flat = dense(place).ravel(order="F")
    cuts = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *cuts, flat.size]).tolist(), **over}


X, Y = PLACES[0][0]


GOOD = corners(X, Y)


TAKEN: dict[str, Callable[[Data], None]] = {
    "plain": lambda data: None,
    "no_info": lambda data: data.pop("info"),
    "annotation_ids_from_0": each_annotation(id=lambda n: n),
    "annotation_ids_missing": each_annotation(id=...),
    "annotation_ids_null": each_annotation(id=None),
    "annotation_ids_equal": each_annotation(id=1),
    "annotation_ids_texts": each_annotation(id=lambda n: f"a{n}"),
    "annotation_ids_floats": each_annotation(id=float),
    "annotation_ids_lists": each_annotation(id=lambda n: [n]),
    "image_ids_from_0": ids(images=lambda n: n - 1),
    "image_ids_texts": ids(images=lambda n: f"img{n}"),
    "image_ids_floats": ids(images=float),
    "image_ids_fractions": ids(images=lambda n: n / 3),
    "image_ids_huge": ids(images=lambda n: n * 10**30),
    "image_ids_mixed": ids(images=lambda n: str(n) if n == 2 else n),
    "image_ids_negative": ids(images=lambda n: -n),
    "category_ids_from_0": ids(categories=lambda n: n - 1),
    "category_ids_texts": ids(categories=str),
    "category_ids_floats": ids(categories=float),
    "category_names_repeat": lambda data: change(data["categories"], {"name": "red"}),
    "category_names_numbers": lambda data: change(data["categories"], {"name": 5}),
    "image_listed_twice": more("images", {}),
    "area_missing": each_annotation(area=...),
    "area_text": each_annotation(area="192"),
    "area_nan": each_annotation(area=math.nan),
    "area_negative": each_annotation(area=-1),
    "iscrowd_missing": each_annotation(iscrowd=...),
    "iscrowd_null": each_annotation(iscrowd=None),
    "iscrowd_bool": each_annotation(iscrowd=False),
    "ignore": first(ignore=1),
    "segmentation_missing": first(segmentation=...),
    "segmentation_null": first(segmentation=None),
    "segmentation_empty": first(segmentation=[]),
    "polygon_empty": first(segmentation=[[]]),
    "polygon_of_one_point": first(segmentation=[[X, Y]]),
    "polygon_of_two_points": first(segmentation=[[X, Y, X + BOX[0], Y + BOX[1]]]),
    "polygon_of_one_point_beside": first(segmentation=[GOOD, [X + 3, Y + 3]]),
    "polygon_without_pixels": first(segmentation=[[X, Y, X, Y, X, Y]]),
    "polygon_outside": first(segmentation=[[60, 40, 70, 40, 70, 50]]),
    "polygon_of_floats": first(segmentation=[[float(value) for value in GOOD]]),
    "polygons_of_two_parts": first(segmentation=[GOOD, GOOD]),
    "crowd_without_mask": more("annotations", {"iscrowd": 1, "segmentation": []}),
    "crowd_of_run_lengths": more("annotations", {"iscrowd": 1, "segmentation": lengths((5, 5))}),
    "run_lengths": first(segmentation=lengths()),
    "run_lengths_packed": first(segmentation=packed()),
    "run_lengths_of_nothing": first(segmentation=lengths(counts=[HEIGHT * WIDTH])),
    "box_of_floats": first(bbox=[X + 0.0, Y + 0.0, *map(float, BOX)]),
    "box_without_extent": first(bbox=[X, Y, 0, 0]),
    "box_and_mask_without_extent": more("annotations", {"bbox": [X, Y, 0, 5], "segmentation": [[X, Y, X, Y, X, Y]]}),
    "size_missing": each_image(width=..., height=...),
    "size_null": each_image(width=None),
    "size_of_floats": each_image(width=float(WIDTH)),
    "name_with_dot": each_image(file_name=lambda n: f"./{n + 1}.png"),
}  # fmt: skip


MISSHAPEN = [[[X, Y], [X + 9, Y], [X + 9, Y + 9]]]


REFUSED: dict[str, tuple[Callable[[Data], None], str]] = {
    "no_images": (lambda data: data.pop("images"), "no list 'images'"),
    "annotations_not_objects": (lambda data: data.update(annotations=[1]), "no list 'annotations'"),
    "no_annotation": (lambda data: data.update(annotations=[]), "no annotations"),
    "image_unknown": (first(image_id=77), "annotation 1 refers to image 77, which is not listed"),
    "image_id_a_list": (first(image_id=[1]), r"annotation 1 refers to image \[1\]"),
    "category_unknown": (first(category_id="red"), "annotation 1 refers to category 'red'"),
    "category_ids_repeat": (lambda data: change(data["categories"], {"id": 1}), "two categories have the id 1"),
    "category_without_name": (lambda data: change(data["categories"], {"name": ...}), "category 1 in the list"),
    "image_ids_repeat": (more("images", {"file_name": "2.png"}), "two images have the id 1: '1.png' and '2.png'"),
    "image_with_two_ids": (more("images", {"id": 9}), "'1.png' is listed with two ids, 1 and 9"),
    "image_without_id": (each_image(id=...), "image '1.png' has no id"),
    "image_without_name": (each_image(file_name=...), "image 1 has no file name"),
    "name_a_number": (each_image(file_name=5), "the file name of 1 is 5"),
    "name_with_nul": (each_image(file_name="a\0b"), "the file name of 1"),
    "name_absolute": (each_image(file_name="/etc/passwd"), "points outside the folder"),
    "name_with_folder": (each_image(file_name=lambda n: f"val2017/{n}.png"), "cannot be read: No such file"),
    "name_with_backslash": (each_image(file_name=lambda n: f"sub\\{n}.png"), "cannot be read: No such file"),
    "size_wrong": (each_image(width=99), "the annotations are for 99 x 32 pixels, but the image has 48 x 32"),
    "size_0": (each_image(width=0), "the width of image 1 is 0"),
    "size_a_text": (each_image(height="32"), "the height of image 1 is '32'"),
    "size_endless": (each_image(height=math.inf), "the height of image 1 is inf"),
    "iscrowd_a_text": (first(iscrowd="no"), "iscrowd of annotation 1 is 'no'"),
    "box_missing": (first(bbox=...), "the box of annotation 1 is None"),
    "box_of_three": (first(bbox=[X, Y, 9]), r"the box of annotation 1 is \[.*\], not four finite numbers"),
    "box_nan": (first(bbox=[math.nan, Y, *BOX]), "not four finite numbers"),
    "box_endless": (first(bbox=[X, Y, math.inf, 9]), "not four finite numbers"),
    "box_of_texts": (first(bbox=["1", "2", "3", "4"]), "not four finite numbers"),
    "box_negative": (first(bbox=[X + 16, Y + 12, -16, -12]), "the box .* of annotation 1 is outside"),
    "box_far_outside": (first(bbox=[X, Y, 1e9, 9]), "the box .* of annotation 1 is outside"),
    "box_without_id": (first(bbox=[X, Y], id=...), "the box of annotation 1 in the list"),
    "segmentation_a_text": (first(segmentation="x"), "annotation 1 is neither polygons nor run lengths"),
    "polygon_flat": (first(segmentation=GOOD), "annotation 1 is not a list of polygons"),
    "polygon_of_pairs": (first(segmentation=MISSHAPEN), "annotation 1 is not a list of polygons"),
    "polygon_nan": (first(segmentation=[[*GOOD[:-1], math.nan]]), "annotation 1 is not a list of polygons"),
    "polygon_odd": (first(segmentation=[GOOD[:-1]]), "a polygon of annotation 1 has an odd number"),
    "polygon_far_outside": (first(segmentation=[[*GOOD[:-1], 1e9]]), "a polygon of annotation 1 is far outside"),
    "run_lengths_turned": (first(segmentation=lengths(size=[WIDTH, HEIGHT])), r"mask size mismatch in annotation 1"),
    "run_lengths_short": (first(segmentation=lengths(counts=[5, 5])), "annotation 1 cover 10 pixels"),
    "run_lengths_negative": (first(segmentation=lengths(counts=[-5, 1541])), "annotation 1 has invalid run lengths"),
    "run_lengths_no_numbers": (first(segmentation=lengths(counts=["a"])), "annotation 1 has invalid run lengths"),
    "run_lengths_missing": (first(segmentation={"size": [HEIGHT, WIDTH]}), "annotation 1 has invalid run lengths"),
    "run_lengths_cut": (first(segmentation=packed(counts=packed()["counts"][:5])), "the run lengths of annotation 1"),
    "run_lengths_no_code": (first(segmentation=packed(counts="\u732b")), "annotation 1 has invalid run lengths"),
    "all_without_mask": (each_annotation(segmentation=[]), "nothing to train on"),
    "all_of_two_points": (each_annotation(segmentation=[[X, Y, X + 9, Y + 9]]), "nothing to train on"),
    "all_crowds": (each_annotation(iscrowd=1), "nothing to train on"),
}  # fmt: skip


def edited(edit: Callable[[Data], None]) -> str:
    data = plain()
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize("variant", TAKEN)
def test_who_finds_everything_scores_one(variant, pictures, tmp_path):
    text = edited(TAKEN[variant])
    root = write(tmp_path, pictures, text, text)
    train, val = open_coco(root)
    for data in (train, val):
        for index in range(len(data)):
            image, objects = data.read(index)
            assert objects.masks.shape == (len(objects.labels), image.height, image.width)
            assert objects.masks.any(axis=(1, 2)).all()
    scores = average_precision(val.dataset, perfect(val))
    assert (scores["ap_box"], scores["ap_mask"]) == (pytest.approx(1), pytest.approx(1))
    assert scores["box"]["per_class"] == dict.fromkeys(val.classes, pytest.approx(1))
    assert len(scores["box"]["per_class"]) == len(scores["mask"]["per_class"]) == 2


@pytest.mark.parametrize("part", ["train2017", "val2017"])
@pytest.mark.parametrize("variant", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(variant, part, pictures, tmp_path):
    edit, message = REFUSED[variant]
    texts = {name: edited(edit if name == part else TAKEN["plain"]) for name in ("train2017", "val2017")}
    root = write(tmp_path, pictures, texts["train2017"], texts["val2017"])
    with pytest.raises(SourceError, match=message) as caught:
        open_coco(root)
    assert part in str(caught.value.where)
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, '{"images": ' + "1" * 5000 + "}", '"\xff"'])
def test_what_is_no_such_file_is_refused(text, pictures, tmp_path):
    with pytest.raises(SourceError, match=r"not JSON|not a COCO"):
        open_coco(write(tmp_path, pictures, text, edited(TAKEN["plain"])))


def test_a_byte_order_mark_is_no_part_of_the_file(pictures, tmp_path):
    text = "\ufeff" + edited(TAKEN["plain"])
    assert [len(part) for part in open_coco(write(tmp_path, pictures, text, text))] == [3, 3]


def test_what_is_left_out_is_counted(pictures, tmp_path):
    def edit(data: Data) -> None:
        data["images"].append(dict(data["images"][0]))
        data["annotations"][0]["segmentation"] = [[1, 2], [3, 4, 5, 6]]
        data["annotations"][1]["segmentation"].append([])
        data["annotations"][2]["bbox"][2] = 0.5

    train, val = open_coco(write(tmp_path, pictures, edited(edit), edited(edit)))
    assert train.left_out == {"images": 1, "entries": 1, "annotations": 1, "polygons": 3, "narrow": 1}
    assert val.left_out == {**train.left_out, "images": 0}
    assert [len(train), len(val)] == [2, 3]


def test_other_masks_are_other_data(pictures, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, one = open_coco(write(tmp_path / "a", pictures, edited(TAKEN["plain"]), edited(TAKEN["plain"])))
    _, two = open_coco(write(tmp_path / "b", pictures, edited(TAKEN["plain"]), edited(TAKEN["run_lengths_of_nothing"])))
    assert one.identity != two.identity


@given(st.lists(st.booleans(), min_size=1, max_size=300).map(lambda bits: np.array([bits], np.uint8)))
def test_packed_run_lengths_are_read_as_coco_packs_them(bits):
    cuts = np.flatnonzero(np.diff(bits[0], prepend=0)).tolist()
    wanted = np.diff([0, *cuts, bits.size]).tolist()
    assert run_lengths(mask.encode(np.asfortranarray(bits))["counts"].decode()) == wanted


@given(st.text(st.characters(min_codepoint=32, max_codepoint=130), max_size=12))
def test_no_text_breaks_the_reading_of_run_lengths(text):
    assert all(isinstance(number, int) for number in run_lengths(text))
