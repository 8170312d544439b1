"""Label maps and other files: orientation of labels, ignored files, refused files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from cae2pipe.config.base import build
from cae2pipe.config.dense import SegmentSettings
from cae2pipe.dense.label_maps import open_label_maps
from cae2pipe.errors import SourceError


def write(root: Path, stored: tuple[int, int], orientation: int, labels: np.ndarray) -> Path:
    """One image in train and in val, whose left half as stored is red, and a label map."""
    pixels = np.zeros((stored[1], stored[0], 3), np.uint8)
    pixels[:, : stored[0] // 2, 0] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for part in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        Image.fromarray(pixels).save(root / "images" / part / "a.jpg", exif=exif, quality=95)
        Image.fromarray(labels).save(root / "annotations" / part / "a.png")
    (root / "classes.txt").write_text("black\nred\n")
    return root


def settings(upright: bool | None = None) -> SegmentSettings:
    return build(SegmentSettings, {"upright": upright}, "test")


def shown(stored: tuple[int, int], orientation: int) -> np.ndarray:
    """The labels of ``write``'s image as viewers show it."""
    labels = np.zeros((stored[1], stored[0]), np.uint8)
    labels[:, : stored[0] // 2] = 1
    return np.ascontiguousarray(np.rot90(labels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation]))


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("stored", [(32, 16), (16, 16)])
def test_labels_lie_on_their_pixels_whichever_way_up_they_see_them(stored, orientation, upright, tmp_path):
    labels = shown(stored, orientation if upright else 1)
    root = write(tmp_path, stored, orientation, labels)
    open_to_choice = orientation == 3 or (orientation != 1 and stored[0] == stored[1])
    if open_to_choice:
        with pytest.raises(SourceError, match=f"unknown whether .* EXIF orientation {orientation}") as caught:
            open_label_maps(root, settings())
        assert "upright=true" in str(caught.value.fix)
    train, val = open_label_maps(root, settings(upright if open_to_choice else None))
    for data in (train, val):
        image, found = data.read(0)
        red = np.asarray(image)[..., 0] > 128
        assert (red == (found == 1)).mean() > 0.95


def test_labels_of_a_third_size_are_refused_before_training(tmp_path):
    root = write(tmp_path, (32, 16), 6, np.zeros((20, 20), np.uint8))
    with pytest.raises(SourceError, match="for 20 x 20 pixels, but the image has 32 x 16, or 16 x 32 if EXIF"):
        open_label_maps(root, settings())


@pytest.mark.parametrize(("kind", "name"), [("images", "a.png"), ("images", "a.JPEG"), ("annotations", "a.bmp")])
def test_two_files_of_one_stem_are_refused(kind, name, tmp_path):
    root = write(tmp_path, (16, 16), 1, shown((16, 16), 1))
    Image.new("L", (16, 16)).save(root / kind / "val" / name)
    with pytest.raises(SourceError, match=f"two files are named 'a': .*{name}"):
        open_label_maps(root, settings())


def test_files_in_no_pair_are_told(tmp_path):
    root = write(tmp_path, (16, 16), 1, shown((16, 16), 1))
    Image.new("L", (16, 16)).save(root / "annotations" / "train" / "b.png")
    (root / "images" / "train" / "notes.txt").write_text("x")
    train, val = open_label_maps(root, settings())
    assert [note.partition(": ")[2] for note in train.notes] == [
        "ignored 1 file without an image suffix (1 .txt)",
        "ignored 1 label maps without an image, e.g. 'b'",
    ]
    assert (len(train), val.notes) == (1, [])


def test_a_pipe_is_not_waited_for(tmp_path):
    root = write(tmp_path, (16, 16), 1, shown((16, 16), 1))
    (root / "images" / "val" / "a.jpg").unlink()
    os.mkfifo(root / "images" / "val" / "a.jpg")
    with pytest.raises(SourceError, match="this is not a file"):
        open_label_maps(root, settings())
