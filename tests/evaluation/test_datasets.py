"""Labelled data: accepted folders, refused folders, contents of crops."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import DamageError, ManifestError, SourceError
from cae2pipe.evaluation.crops import CentralCrop
from cae2pipe.evaluation.datasets import CropReader, Split, common_labels, open_data, open_split
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from tests.conftest import edit_manifest, write_photos


def write_data(root: Path, classes: int = 2) -> Path:
    write_photos(root / "train", classes, each=4, seed=1)
    write_photos(root / "val", classes, each=3, seed=2)
    return root


def shard(source: Path, out: Path) -> Path:
    build_shard_set(source, out, ShardSettings(samples=5, speed=ShardSpeed(workers=0)), report=Silent())
    return out


def crops(split: Split, size: int = 24):
    reader = CropReader(split, range(len(split.runs)), CentralCrop(size, size))
    return [reader[index] for index in range(len(reader))]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_names_of_the_second_part(name, tmp_path):
    data = write_data(tmp_path / "data")
    (data / "val").rename(data / name)
    train, val = open_data(data, 3)
    assert (train.images, val.images) == (8, 6)
    assert (train.classes, val.classes) == (["class0", "class1"],) * 2
    assert val.root == data / name


def test_a_folder_and_its_shards_hold_the_same_crops(tmp_path):
    data = write_data(tmp_path / "data")
    folder, shards = open_split(data / "train", 3), open_split(shard(data / "train", tmp_path / "shards"), 3)
    assert (folder.classes, folder.images) == (shards.classes, shards.images)

    def content(split: Split) -> list[tuple[int, bytes]]:
        return sorted(
            (int(y), x.tobytes()) for run in crops(split) for x, y in zip(run.pixels, run.labels, strict=True)
        )

    assert content(folder) == content(shards)
    assert len(content(folder)) == 8


def test_crops_are_central(tmp_path):
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 30:50] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "x.png")
    (run,) = [CropReader(open_split(tmp_path, 1), range(1), CentralCrop(20, 40))[0]]
    assert run.pixels.shape == (1, 20, 20, 3)
    assert run.pixels.min() == 255


def test_what_cannot_be_decoded_is_left_out_by_name(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "train" / "class1" / "bad.jpg").write_bytes(b"no image")
    read = crops(open_split(data / "train", 3))
    rejected = [reject for run in read for reject in run.rejected]
    assert [reject["path"] for reject in rejected] == ["class1/bad.jpg"]
    assert "cannot be decoded" in rejected[0]["reason"]
    assert sum(len(run.labels) for run in read) == sum(len(run.pixels) for run in read) == 8


def test_val_may_hold_fewer_classes_and_labels_follow_names(tmp_path):
    data = write_data(tmp_path / "data", classes=3)
    shutil.rmtree(data / "val" / "class1")
    train, val = open_data(data, 4)
    labels = common_labels(torch.tensor([0, 1, 1]), val.classes, train.classes)
    assert labels.tolist() == [0, 2, 2]


def test_val_may_not_hold_classes_that_train_lacks(tmp_path):
    data = write_data(tmp_path / "data", classes=3)
    shutil.rmtree(data / "train" / "class1")
    with pytest.raises(SourceError, match="'class1'"):
        open_data(data, 4)


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        open_data(tmp_path / "nowhere", 4)
    data = write_data(tmp_path / "data")
    with pytest.raises(SourceError, match="no 'train'"):
        open_data(data / "train", 4)
    shutil.rmtree(data / "val")
    with pytest.raises(SourceError, match="no 'val'"):
        open_data(data, 4)
    shutil.copytree(data / "train" / "class0", data / "val")
    with pytest.raises(SourceError, match="no classes"):
        open_data(data, 4)


def test_an_unfinished_shard_set_is_refused(tmp_path):
    data = write_data(tmp_path / "data")
    out = shard(data / "train", tmp_path / "shards")
    edit_manifest(out, complete=False)
    with pytest.raises(ManifestError, match="not finished"):
        open_split(out, 4)


def test_a_changed_shard_is_an_error_and_no_left_out_image(tmp_path):
    data = write_data(tmp_path / "data")
    out = shard(data / "train", tmp_path / "shards")
    tar = sorted((out / "tars").glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[2048] ^= 255  # in the first image
    tar.write_bytes(content)
    with pytest.raises(DamageError) as caught:
        crops(open_split(out, 4))
    assert tar.name in caught.value.where


def test_a_file_that_has_gone_is_an_error_and_no_left_out_image(tmp_path):
    data = write_data(tmp_path / "data")
    split = open_split(data / "train", 3)
    (data / "train" / "class0" / "image001.jpg").unlink()
    with pytest.raises(SourceError) as caught:
        crops(split)
    assert "image001.jpg" in caught.value.where


def test_identity_follows_the_content(tmp_path):
    data = write_data(tmp_path / "data")
    before = open_split(data / "train", 3).identity
    assert open_split(data / "train", 5).identity == before
    assert open_split(data / "val", 3).identity != before
    (data / "train" / "class0").rename(data / "train" / "other")
    assert open_split(data / "train", 3).identity != before


def test_labels_of_archives_are_part_of_what_the_data_are(tmp_path):
    photos = sorted(write_photos(tmp_path / "photos", 2, each=2).rglob("*.jpg"))

    def identity(labels: str) -> str:
        (tmp_path / "data").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "data" / "a-000.tar", "w") as tar:
            for number, (photo, label) in enumerate(zip(photos, labels, strict=True)):
                tar.add(photo, f"{number}.jpg")
                (tmp_path / "label").write_text(label)
                tar.add(tmp_path / "label", f"{number}.cls")
        return open_split(tmp_path / "data", 2).identity

    assert identity("0011") == identity("0011")
    assert identity("0011") != identity("0101")


def test_what_is_passed_over_is_said(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "val" / "class0" / "notes.txt").write_text("x")
    train, val = open_data(data, 3)
    assert (train.remarks, val.remarks) == ((), ("skipped 1 file that is not an image: 1 .txt file",))
