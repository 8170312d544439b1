"""ImageNet's official archives, its ground truth, and the reference manifest that a source is compared with."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.expected import check_expected
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.shards.source import find_splits, scan
from cae2pipe.stages.shard import shard_images
from tests.conftest import contents
from tests.shards.archives import ALONE, class_tars, packed, refused, tar_bytes, tree


def devkit(truth: list[str]) -> bytes:
    """A development kit like ImageNet's: its numbers are not in the order of the synsets, and 1000 is not a leaf."""
    from scipy.io import savemat

    classes = sorted(set(truth), reverse=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, name, f"words of {name}", 0) for number, name in enumerate(classes, 1)]
    synsets = np.array([*rows, (1000, "n00000000", "all of it", len(rows))], dtype=kinds)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    numbers = "".join(f"{classes.index(name) + 1}\n" for name in truth)
    base = "ILSVRC2012_devkit_t12/data/"
    return gzip.compress(
        tar_bytes(
            {
                base + "meta.mat": buffer.getvalue(),
                base + "ILSVRC2012_validation_ground_truth.txt": numbers.encode(),
                "ILSVRC2012_devkit_t12/readme.txt": b"read me",
            }
        )
    )


class TestGroundTruth:
    @pytest.fixture
    def flat(self, photo_files, tmp_path) -> tuple[Path, list[str]]:
        """The images in the layout of ImageNet's validation archive, and their classes in the order of the names."""
        order = sorted(photo_files, key=lambda name: name.split("/")[1])
        names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 13)]
        (tmp_path / "val.tar").write_bytes(
            tar_bytes({name: photo_files[path] for name, path in reversed(list(zip(names, order, strict=True)))})
        )
        for name, path in zip(names, order, strict=True):
            goal = tmp_path / "sorted" / path.split("/")[0] / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(photo_files[path])
        return tmp_path / "val.tar", [path.split("/")[0] for path in order]

    def write(self, folder: Path, kind: str, truth: list[str]) -> Path:
        if kind == "devkit":
            (folder / "devkit.tar.gz").write_bytes(devkit(truth))
            return folder / "devkit.tar.gz"
        if kind == "folder":
            with tarfile.open(fileobj=io.BytesIO(devkit(truth))) as tar:
                tar.extractall(folder, filter="data")
            return folder / "ILSVRC2012_devkit_t12"
        if kind == "lines":
            (folder / "labels.txt").write_text("\n".join(truth) + "\n")
            return folder / "labels.txt"
        rows = [f"ILSVRC2012_val_{n:08d},{name} 1 2 3 4 \n" for n, name in enumerate(truth, 1)]
        (folder / "solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
        return folder / "solution.csv"

    @pytest.mark.parametrize("kind", ["devkit", "folder", "lines", "csv"])
    def test_the_archive_comes_out_as_the_sorted_folder(self, flat, tmp_path, kind):
        archive, truth = flat
        labels = self.write(tmp_path, kind, truth)
        expected = packed(tmp_path / "sorted", tmp_path / "expected")
        (shards,) = shard_images(archive, tmp_path / "out", ALONE, report=Silent(), labels=labels)
        assert contents(shards.root) == expected

    def test_the_official_archives_in_one_folder(self, flat, photo_files, tmp_path):
        archive, truth = flat
        folder = tmp_path / "imagenet"
        folder.mkdir()
        archive.rename(folder / "ILSVRC2012_img_val.tar")
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(class_tars(photo_files)))
        assert find_splits(folder).keys() == {"train", "val"}
        with pytest.raises(SourceError) as caught:
            shard_images(folder, tmp_path / "out", ALONE, report=Silent())
        assert "--labels ILSVRC2012_devkit_t12.tar.gz" in caught.value.fix
        (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(truth))
        train, val = shard_images(folder, tmp_path / "out", ALONE, report=Silent())
        assert (train.root.name, val.root.name) == ("train", "val")
        assert train.classes == val.classes == ["class0", "class1", "class2"]

    def test_what_does_not_fit(self, flat, photo_files, tmp_path):
        archive, truth = flat
        (tmp_path / "short.txt").write_text("\n".join(truth[:-1]))
        assert "11 labels, but the source has 12" in refused(archive, labels=tmp_path / "short.txt").what
        (tmp_path / "numbers.txt").write_text("1\n2\n")
        assert "development kit" in refused(archive, labels=tmp_path / "numbers.txt").what
        (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(tar_bytes({"x": b""})))
        assert "does not contain" in refused(archive, labels=tmp_path / "kit.tar.gz").what
        (tmp_path / "s.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 1 1 1\n")
        assert "no label for 11 images" in refused(archive, labels=tmp_path / "s.csv").what
        endless = tar_bytes({"x": b"1" * 600}, format=tarfile.PAX_FORMAT, pax_headers={"size": "-1536"})
        (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(endless))
        assert "contradict" in refused(archive, labels=tmp_path / "kit.tar.gz").what
        assert "no such file" in refused(archive, labels=tmp_path / "none").what
        assert "already have classes" in refused(tmp_path / "photos", labels=tmp_path / "short.txt").what


class TestExpected:
    def reference(self, tmp_path: Path, images: int = 12) -> str:
        names = {f"class{n}": f"words of {n}, more" for n in range(3)}
        data = {"name": "three", "splits": {"train": {"images": images}, "val": {"images": 3}}, "classes": names}
        (tmp_path / "three.json").write_text(json.dumps(data))
        return str(tmp_path / "three.json")

    def test_a_source_that_is_whole(self, photo_files, tmp_path):
        source = scan(tmp_path / "photos")
        check_expected(source, self.reference(tmp_path))
        check_expected(source, self.reference(tmp_path) + "/train")

    def test_what_is_missing_is_named(self, photo_files, tmp_path):
        for path in (tmp_path / "photos" / "class1").iterdir():
            path.unlink()
        (tmp_path / "photos" / "class1").rename(tmp_path / "photos" / "other")
        (tmp_path / "photos" / "other" / "1.jpg").write_bytes(photo_files["class1/image000.jpg"])
        with pytest.raises(SourceError) as caught:
            check_expected(scan(tmp_path / "photos"), self.reference(tmp_path), "val")
        assert caught.value.what == (
            "this is not three/val: 1 of its 3 classes are missing: class1 (words of 1); "
            "unexpected classes (1): other; it has 9 images instead of 3"
        )

    def test_names_of_manifests(self, photo_files, tmp_path):
        source = scan(tmp_path / "photos")
        for bad in ("imagenet2k", "imagenet1k/test"):
            with pytest.raises(SettingsError):
                check_expected(source, bad)
        (tmp_path / "bad.json").write_text("[]")
        with pytest.raises(SettingsError, match="not a reference manifest"):
            check_expected(source, str(tmp_path / "bad.json"))

    def test_imagenet_on_the_command_line(self, photo_files, tmp_path):
        arguments = ["shard", str(tmp_path / "photos"), str(tmp_path / "out"), "--expect", "imagenet1k"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "1000 of its 1000 classes are missing: n01440764 (tench), n01443537 (goldfish)" in result.stderr
        assert "12 images instead of 1281167" in result.stderr
        assert not (tmp_path / "out").exists()


def test_imagenet_s_layout_from_real_photographs(real, tmp_path):
    photographs = tree(real / "imagenet-samples")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(class_tars(photographs)))
    arguments = ["shard", str(tmp_path / "ILSVRC2012_img_train.tar"), str(tmp_path / "out"), "--workers", "0"]
    result = CliRunner().invoke(app, [*arguments, "--expect", "imagenet1k"])
    assert result.exit_code == 2
    assert f"{1000 - len({name.split('/')[0] for name in photographs})} of its 1000 classes" in result.stderr
    assert CliRunner().invoke(app, arguments).exit_code == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.classes == sorted({name.split("/")[0] for name in photographs})
    assert shards.images == len(photographs)
    for shard in shards.shards:
        for sample in shards.read(shard, 0, 5):
            assert shards.classes[sample.label] == sample.key.split("+")[0]
