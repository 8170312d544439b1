"""Tars in WebDataset's format: labels, keys and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cae2pipe.shards.checking import read_piece
from cae2pipe.shards.source import scan
from tests.shards.archives import packed, refused, tar_bytes


class TestWebDataset:
    def write(self, root: Path, photo_files: dict[str, bytes], labels: bool = True) -> Path:
        root.mkdir()
        images = list(photo_files.values())
        for number in range(3):
            files = {}
            for index, image in enumerate(images[number * 4 : number * 4 + 4]):
                files[f"a.b/{index:03d}.jpg"] = image
                files[f"a.b/{index:03d}.json"] = b"{}"
                if labels:
                    files[f"a.b/{index:03d}.cls"] = str(number * 5).encode()
            (root / f"train-{number:04d}.tar").write_bytes(tar_bytes(files))
        return root

    def test_labels_and_keys(self, photo_files, tmp_path):
        source = scan(self.write(tmp_path / "wds", photo_files))
        assert source.classes == [str(n) for n in range(11)]
        assert [entry.label for entry in source.entries] == [0] * 4 + [5] * 4 + [10] * 4
        assert source.entries[0].key == "train-0000+a~2eb+000"
        assert [read_piece(source.piece(entry)) for entry in source.entries] == list(photo_files.values())

    def test_one_tar_of_them(self, photo_files, tmp_path):
        self.write(tmp_path / "wds", photo_files)
        assert len(scan(tmp_path / "wds" / "train-0001.tar").entries) == 4

    def test_names_of_labels(self, photo_files, tmp_path):
        root = self.write(tmp_path / "wds", photo_files)
        (root / "classes.txt").write_text("".join(f"name {n}\n" for n in range(12)))
        assert scan(root).classes[10:] == ["name 10", "name 11"]
        (root / "classes.txt").write_text("only\none\n")
        assert "the tars use 11" in refused(root).what

    def test_without_labels(self, photo_files, tmp_path):
        source = scan(self.write(tmp_path / "wds", photo_files, labels=False))
        assert source.classes == []
        assert {entry.label for entry in source.entries} == {-1}

    def test_tars_of_which_only_some_have_labels(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        (tmp_path / "wds").mkdir()
        (tmp_path / "wds" / "a.tar").write_bytes(tar_bytes({"1.jpg": image}))
        (tmp_path / "wds" / "b.tar").write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0"}))
        assert "some of these tars have labels" in refused(tmp_path / "wds").what

    def test_labels_that_are_missing_or_none(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", "2.jpg": image}))
        assert "'2.jpg' has no .cls" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"cat"}))
        assert "not a label: 'cat'" in refused(path).what
        for text in ("\u0663", "\u00b2", "-1", "1 2", "__import__('os')"):
            path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": text.encode()}))
            assert "not a label" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0" * 1000}))
        assert "1000 bytes" in refused(path).what

    def test_labels_of_names_with_dots(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        names = ["22.05.0", "22.05.1", "a.b/img.v1", "c", "d.left", "d.right"]
        labels = {"22.05.0.cls": b"1", "22.05.1.cls": b"2", "a.b/img.v1.CLS": b"3", "c.cls": b"4", "d.cls": b"5"}
        (tmp_path / "a.tar").write_bytes(tar_bytes({**{f"{name}.jpg": image for name in names}, **labels}))
        source = scan(tmp_path / "a.tar")
        assert {entry.path: entry.label for entry in source.entries} == {
            f"a/{name}.jpg": label for name, label in zip(names, [1, 2, 3, 4, 5, 5], strict=True)
        }

    @pytest.mark.parametrize("name", ["2.cls", "1.target.cls", "1", "b/1.cls"])
    def test_a_label_without_an_image_is_an_error(self, photo_files, tmp_path, name):
        image = photo_files["class0/image000.jpg"]
        name = name if name.endswith(".cls") else "1.jpg.cls"
        (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", name: b"1"}))
        assert f"{name!r} belongs to no image" in refused(tmp_path / "a.tar").what

    def test_a_label_is_never_lost_with_its_tar(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        inner = tar_bytes({"1.jpg": image, "1.cls": b"7"})
        path = tmp_path / "outer.tar"
        path.write_bytes(tar_bytes({"a-000.tar": inner, "v1.2.tar": inner}))
        assert [entry.label for entry in scan(path).entries] == [7, 7]
        path.write_bytes(tar_bytes({"a-000.tar": inner, "1.cls": b"7"}))
        assert "and images or labels (1.cls)" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", "1.CLS": b"1"}))
        assert "twice" in refused(path).what

    def test_labels_far_beyond_any_list(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"999999999"}))
        assert "the label 999999999" in refused(path).what
        (tmp_path / "classes.txt").write_text("one\n")
        assert "the tars use 1000000000" in refused(path).what
        (tmp_path / "classes.txt").unlink()
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"99999"}))
        assert len(scan(path).classes) == 100_000

    def test_two_images_of_one_sample(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": image, "1.png": image, "1.cls": b"0"}))
        assert "two files would have the same key" in refused(tmp_path / "a.tar").what

    def test_our_own_shard_sets_need_no_sharding(self, photo_files, tmp_path):
        packed(tmp_path / "photos", tmp_path / "out")
        assert "made by cae2pipe" in refused(tmp_path / "out").what
        again = scan(tmp_path / "out" / "tars")
        assert len(again.entries) == 12
