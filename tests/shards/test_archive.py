"""Archives and lists as sources: ImageNet's own, WebDataset's, and what is wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cae2pipe.artifacts.places import place
from cae2pipe.cli import app
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.checking import read_piece
from cae2pipe.shards.expected import check_expected
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.shards.source import find_splits, scan
from cae2pipe.stages.shard import shard_images
from tests.conftest import contents, write_photos

ALONE = ShardSettings(samples=4, speed=ShardSpeed(workers=0))


def tar_bytes(files: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def class_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    """One tar a class of ``class/name`` files, as ImageNet packs them."""
    return {
        f"{label}.tar": tar_bytes(
            {name.split("/")[1]: data for name, data in files.items() if name.split("/")[0] == label}
        )
        for label in sorted({name.split("/")[0] for name in files})
    }


def devkit(truth: list[str]) -> bytes:
    """A development kit like ImageNet's: its numbers are not in the order of the synsets, and 1000 is no leaf here."""
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


@pytest.fixture
def photos(tmp_path) -> dict[str, bytes]:
    """12 images in 3 classes, by ``class/name``."""
    return tree(write_photos(tmp_path / "photos", classes=3, each=4))


def packed(source: Path, out: Path) -> dict[str, bytes]:
    return contents(build_shard_set(source, out, ALONE, Silent()).root)


def refused(source: Path, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        scan(source, **options)
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_every_form_gives_the_same_shard_set_as_the_folder(photos, tmp_path):
    expected = packed(tmp_path / "photos", tmp_path / "expected")
    (tmp_path / "nested.tar").write_bytes(tar_bytes(class_tars(photos)))
    (tmp_path / "flat.tar").write_bytes(tar_bytes(photos))
    (tmp_path / "deep.tar").write_bytes(tar_bytes({f"./data/train/{name}": data for name, data in photos.items()}))
    (tmp_path / "pax.tar").write_bytes(tar_bytes(photos, format=tarfile.PAX_FORMAT))
    (tmp_path / "tars").mkdir()
    for name, data in class_tars(photos).items():
        (tmp_path / "tars" / name).write_bytes(data)
    (tmp_path / "photos" / "list.txt").write_text("".join(f"{name}\t{name.split('/')[0]}\n" for name in photos))
    sources = ["nested.tar", "flat.tar", "deep.tar", "pax.tar", "tars", "photos/list.txt"]
    for number, source in enumerate(sources):
        assert packed(tmp_path / source, tmp_path / str(number)) == expected, source


def test_nothing_is_unpacked_and_hidden_files_are_passed_over(photos, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({**photos, "class0/._image000.jpg": b"x", ".DS_Store": b"x", "readme.txt": b"x"}))
    source = scan(path)
    assert [entry.path for entry in source.entries] == sorted(photos)
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photos


def test_an_archive_on_another_place(photos, tmp_path):
    remote = place("memory://archives/nested.tar")
    remote.write_bytes(tar_bytes(class_tars(photos)))
    source = scan(remote)
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photos
    for name, data in photos.items():
        place(f"memory://folder/{name}").write_bytes(data)
    source = scan(place("memory://folder"))
    assert source.classes == ["class0", "class1", "class2"]
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photos


def test_member_names_are_no_paths(tmp_path, photos):
    image = next(iter(photos.values()))
    path = tmp_path / "evil.tar"
    path.write_bytes(tar_bytes({"/etc/passwd.jpg": image, "/etc/\x1b[31m\n.jpg": image}))
    before = tree(tmp_path)
    shards = build_shard_set(path, tmp_path / "out", ALONE, Silent())
    assert shards.images == 2
    assert shards.classes == ["etc"]
    assert {name for name in tree(tmp_path) if not name.startswith("out/")} == set(before)
    keys = {sample.key for shard in shards.shards for sample in shards.index(shard)}
    assert keys == {"etc+passwd", "etc+~1b~5b31m~0a"}
    for name in ("a/../../../evil.jpg", "../evil.jpg", "a/../b.txt"):
        path.write_bytes(tar_bytes({"a/1.jpg": image, name: image}))
        assert "leads out of the archive" in refused(path).what


class TestBroken:
    def test_cut_off(self, photos, tmp_path):
        path = tmp_path / "a.tar"
        data = tar_bytes(class_tars(photos))
        for share in (0.2, 0.5, 0.75):
            path.write_bytes(data[: int(len(data) * share)])
            assert "checksum" in refused(path).fix

    def test_a_broken_header(self, photos, tmp_path):
        path = tmp_path / "a.tar"
        data = bytearray(tar_bytes(photos))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            offset = tar.getmembers()[4].offset
        data[offset + 150] ^= 1  # in the header's checksum
        path.write_bytes(data)
        assert refused(path).what == f"the archive is broken at byte {offset}"

    def test_compressed(self, photos, tmp_path):
        (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(photos)))
        assert "gunzip" in refused(tmp_path / "a.tar").fix

    def test_no_tar_at_all(self, tmp_path):
        (tmp_path / "a.tar").write_bytes(b"x" * 5000)
        assert "cannot be read" in refused(tmp_path / "a.tar").what

    def test_links(self, tmp_path):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("cat/1.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        (tmp_path / "a.tar").write_bytes(buffer.getvalue())
        assert "is a link" in refused(tmp_path / "a.tar").what

    def test_forms_that_mix(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({**class_tars(photos), "x.jpg": image}))
        assert "beside images" in refused(path).what
        path.write_bytes(tar_bytes({**photos, "x.jpg": image}))
        assert "beside the class folders" in refused(path).what
        path.write_bytes(tar_bytes({"train/a/1.jpg": image, "val/a/1.jpg": image}))
        assert "splits train, val" in refused(path).what
        path.write_bytes(tar_bytes({"a.tar": tar_bytes({"1.jpg": image}), "b.tar": tar_bytes({"x.txt": b""})}))
        assert "'b' holds no images" in refused(path).what
        path.write_bytes(tar_bytes({"x.txt": b""}))
        assert "no images" in refused(path).what


def joined(*tars: dict[str, bytes], between: int = 0) -> bytes:
    return bytes(between).join(map(tar_bytes, tars))


class TestJoined:
    """``cat a.tar b.tar``: an archive behind the first one's end."""

    def test_all_images_are_taken_and_the_user_is_told(self, photos, tmp_path):
        halves = dict(list(photos.items())[:5]), dict(list(photos.items())[5:])
        path = tmp_path / "a.tar"
        for between in (0, 512, 10 * 2**20):
            path.write_bytes(joined(*halves, between=between))
            source = scan(path)
            assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photos
            assert source.remarks() == [f"{path} is 2 archives, one behind the other: all are read"]

    def test_inside_another_archive(self, photos, tmp_path):
        tars = class_tars(photos)
        more = tar_bytes({"more.jpg": photos["class0/image000.jpg"]})
        (tmp_path / "a.tar").write_bytes(tar_bytes({name: data + more for name, data in tars.items()}))
        assert len(scan(tmp_path / "a.tar").entries) == 15

    def test_what_follows_the_end_and_is_no_archive(self, photos, tmp_path):
        path = tmp_path / "a.tar"
        whole = tar_bytes(photos)
        for rest in (b"x" * 512, bytes(100) + b"x", bytes(2**20) + b"\1"):
            path.write_bytes(whole + rest)
            assert "is no tar" in refused(path).what
        images = list(photos.items())
        path.write_bytes(tar_bytes(dict(images[:5])).rstrip(b"\0") + bytes(512) + tar_bytes(dict(images[5:])))
        with pytest.raises(SourceError, match=r"broken|cut off|no tar"):
            scan(path)

    def test_a_tar_without_an_end(self, photos, tmp_path):
        whole = tar_bytes(photos)
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        (tmp_path / "a.tar").write_bytes(whole[:end])
        source = scan(tmp_path / "a.tar")
        assert len(source.entries) == 12
        assert "no end mark" in source.remarks()[0]

    def test_an_inner_tar_without_an_end_does_not_read_the_next(self, photos, tmp_path):
        bare = {name: data[: len(data.rstrip(b"\0")) // 512 * 512 + 512] for name, data in class_tars(photos).items()}
        (tmp_path / "a.tar").write_bytes(tar_bytes(bare))
        assert [entry.label for entry in scan(tmp_path / "a.tar").entries] == [0] * 4 + [1] * 4 + [2] * 4


class TestHostile:
    """Headers that lie: one clear error, or the images as they are; never a loop, a long list or a traceback."""

    def tar(self, path: Path, image: bytes, **fields) -> Path:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, own in (("a/0.jpg", {}), ("b/1.jpg", fields), ("b/2.jpg", {})):
                info = tarfile.TarInfo(name)
                info.size = len(image)
                for field, value in own.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(image))
        return path

    @pytest.mark.parametrize("size", ["-1536", "-1", str(-(10**30)), str(10**18), "0", "zebra", "9" * 5000])
    def test_sizes(self, photos, tmp_path, size):
        image = photos["class0/image000.jpg"]
        refused(self.tar(tmp_path / "a.tar", image, pax_headers={"size": size}))

    def test_extended_headers_that_take_long(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        error = refused(self.tar(tmp_path / "a.tar", image, pax_headers={"comment": "1" * 2**19}))
        assert "255 digits" in error.what
        error = refused(self.tar(tmp_path / "a.tar", image, pax_headers={"comment": "a" * 2**21}))
        assert "a header of" in error.what

    def test_a_chain_of_extended_headers(self, photos, tmp_path):
        header = tarfile.TarInfo("x")
        header.type = tarfile.XHDTYPE
        data = header.tobuf(tarfile.USTAR_FORMAT) * 5000 + tar_bytes(photos)
        (tmp_path / "a.tar").write_bytes(data)
        assert "cannot be read" in refused(tmp_path / "a.tar").what

    def test_sizes_for_all_members(self, photos, tmp_path):
        data = tar_bytes(photos, format=tarfile.PAX_FORMAT, pax_headers={"size": "10"})
        (tmp_path / "a.tar").write_bytes(data)
        assert "contradict" in refused(tmp_path / "a.tar").what

    def test_what_bears_an_image_s_name_and_is_no_file(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
            error = refused(self.tar(tmp_path / "a.tar", b"", type=kind))
            assert "is no file" in error.what
        self.tar(tmp_path / "a.tar", image, type=b"M")
        assert "another volume" in refused(tmp_path / "a.tar").what

    def test_very_deep_names(self, photos, tmp_path):
        (tmp_path / "a.tar").write_bytes(tar_bytes({"d/" * 100_000 + "0.jpg": photos["class0/image000.jpg"]}))
        assert len(scan(tmp_path / "a.tar").entries) == 1

    def test_pipes_instead_of_archives(self, photos, tmp_path):
        (tmp_path / "tars").mkdir()
        os.mkfifo(tmp_path / "tars" / "a.tar")
        assert "is not a file" in refused(tmp_path / "tars").what
        (tmp_path / "tars" / "a.tar").unlink()
        (tmp_path / "tars" / "a.tar").write_bytes(tar_bytes({"1.jpg": photos["class0/image000.jpg"], "1.cls": b"0"}))
        os.mkfifo(tmp_path / "tars" / "classes.txt")
        assert "not a file" in refused(tmp_path / "tars").what

    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        pax=st.booleans(),
        member=st.integers(0, 11),
        field=st.sampled_from([(100, 24), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]),
        value=st.one_of(
            st.binary(min_size=1, max_size=12),
            st.sampled_from([b"x", b"g", b"L", b"S", b"M", b"5", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 11]),
        ),
    )
    def test_damaged_headers_give_the_images_or_an_error(self, tmp_path, pax, member, field, value):
        """Whatever one header of a real tar claims: its checksum is made to fit."""
        photos = {f"class{number % 3}/{number}.jpg": b"%d" % number * 400 for number in range(12)}
        whole = bytearray(tar_bytes(photos, format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT))
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            offset = tar.getmembers()[member].offset
        value = value[: field[1]]
        whole[offset + field[0] : offset + field[0] + len(value)] = value
        header = whole[offset : offset + 512]
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
        whole[offset : offset + 512] = header
        (tmp_path / "a.tar").write_bytes(whole)
        try:
            source = scan(tmp_path / "a.tar")
        except SourceError as caught:
            error = caught
        else:
            found = [read_piece(source.piece(entry)) for entry in source.entries]
            assert set(found) <= set(photos.values())
            # A member whose type is a folder's, or an extended header's, is one: no reader can tell.
            assert len(found) + source.passed_over.total() >= len(photos) - (field == (156, 1))
            return
        assert error.where
        assert error.fix


class TestWebDataset:
    def write(self, root: Path, photos: dict[str, bytes], labels: bool = True) -> Path:
        root.mkdir()
        images = list(photos.values())
        for number in range(3):
            files = {}
            for place_, image in enumerate(images[number * 4 : number * 4 + 4]):
                files[f"a.b/{place_:03d}.jpg"] = image
                files[f"a.b/{place_:03d}.json"] = b"{}"
                if labels:
                    files[f"a.b/{place_:03d}.cls"] = str(number * 5).encode()
            (root / f"train-{number:04d}.tar").write_bytes(tar_bytes(files))
        return root

    def test_labels_and_keys(self, photos, tmp_path):
        source = scan(self.write(tmp_path / "wds", photos))
        assert source.classes == [str(n) for n in range(11)]
        assert [entry.label for entry in source.entries] == [0] * 4 + [5] * 4 + [10] * 4
        assert source.entries[0].key == "train-0000+a~2eb+000"
        assert [read_piece(source.piece(entry)) for entry in source.entries] == list(photos.values())

    def test_one_tar_of_them(self, photos, tmp_path):
        self.write(tmp_path / "wds", photos)
        assert len(scan(tmp_path / "wds" / "train-0001.tar").entries) == 4

    def test_names_of_labels(self, photos, tmp_path):
        root = self.write(tmp_path / "wds", photos)
        (root / "classes.txt").write_text("".join(f"name {n}\n" for n in range(12)))
        assert scan(root).classes[10:] == ["name 10", "name 11"]
        (root / "classes.txt").write_text("only\none\n")
        assert "the tars use 11" in refused(root).what

    def test_without_labels(self, photos, tmp_path):
        source = scan(self.write(tmp_path / "wds", photos, labels=False))
        assert source.classes == []
        assert {entry.label for entry in source.entries} == {-1}

    def test_tars_of_which_only_some_have_labels(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        (tmp_path / "wds").mkdir()
        (tmp_path / "wds" / "a.tar").write_bytes(tar_bytes({"1.jpg": image}))
        (tmp_path / "wds" / "b.tar").write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0"}))
        assert "some of these tars have labels" in refused(tmp_path / "wds").what

    def test_labels_that_are_missing_or_none(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", "2.jpg": image}))
        assert "'2.jpg' has no .cls" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"cat"}))
        assert "no label: 'cat'" in refused(path).what
        for text in ("\u0663", "\u00b2", "-1", "1 2", "__import__('os')"):
            path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": text.encode()}))
            assert "no label" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0" * 1000}))
        assert "1000 bytes" in refused(path).what

    def test_labels_of_names_with_dots(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        names = ["22.05.0", "22.05.1", "a.b/img.v1", "c", "d.left", "d.right"]
        labels = {"22.05.0.cls": b"1", "22.05.1.cls": b"2", "a.b/img.v1.CLS": b"3", "c.cls": b"4", "d.cls": b"5"}
        (tmp_path / "a.tar").write_bytes(tar_bytes({**{f"{name}.jpg": image for name in names}, **labels}))
        source = scan(tmp_path / "a.tar")
        assert {entry.path: entry.label for entry in source.entries} == {
            f"a/{name}.jpg": label for name, label in zip(names, [1, 2, 3, 4, 5, 5], strict=True)
        }

    @pytest.mark.parametrize("name", ["2.cls", "1.target.cls", "1", "b/1.cls"])
    def test_a_label_without_an_image_is_an_error(self, photos, tmp_path, name):
        image = photos["class0/image000.jpg"]
        name = name if name.endswith(".cls") else "1.jpg.cls"
        (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", name: b"1"}))
        assert f"{name!r} belongs to no image" in refused(tmp_path / "a.tar").what

    def test_a_label_is_never_lost_with_its_tar(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        inner = tar_bytes({"1.jpg": image, "1.cls": b"7"})
        path = tmp_path / "outer.tar"
        path.write_bytes(tar_bytes({"a-000.tar": inner, "v1.2.tar": inner}))
        assert [entry.label for entry in scan(path).entries] == [7, 7]
        path.write_bytes(tar_bytes({"a-000.tar": inner, "1.cls": b"7"}))
        assert "beside images or labels (1.cls)" in refused(path).what
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"0", "1.CLS": b"1"}))
        assert "twice" in refused(path).what

    def test_labels_far_beyond_any_list(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"999999999"}))
        assert "the label 999999999" in refused(path).what
        (tmp_path / "classes.txt").write_text("one\n")
        assert "the tars use 1000000000" in refused(path).what
        (tmp_path / "classes.txt").unlink()
        path.write_bytes(tar_bytes({"1.jpg": image, "1.cls": b"99999"}))
        assert len(scan(path).classes) == 100_000

    def test_two_images_of_one_sample(self, photos, tmp_path):
        image = photos["class0/image000.jpg"]
        (tmp_path / "a.tar").write_bytes(tar_bytes({"1.jpg": image, "1.png": image, "1.cls": b"0"}))
        assert "two files would have the key" in refused(tmp_path / "a.tar").what

    def test_our_own_shard_sets_need_no_sharding(self, photos, tmp_path):
        packed(tmp_path / "photos", tmp_path / "out")
        assert "made by cae2pipe" in refused(tmp_path / "out").what
        again = scan(tmp_path / "out" / "tars")
        assert len(again.entries) == 12


class TestLists:
    def test_paths_alone_and_from_elsewhere(self, photos, tmp_path):
        path = tmp_path / "list.txt"
        path.write_text(f"photos/class0/image001.jpg\n\n{tmp_path}/photos/class1/image002.jpg\r\n")
        source = scan(path)
        assert source.classes == []
        assert [read_piece(source.piece(e)) for e in source.entries] == [
            photos["class1/image002.jpg"],
            photos["class0/image001.jpg"],
        ]

    @pytest.mark.parametrize(
        ("text", "line", "what"),
        [
            ("photos/class0/image001.jpg\nphotos/none.jpg\n", 2, "no such file"),
            ("photos/class0/image001.jpg\tcat\nphotos/class0/image002.jpg\n", 2, "some lines"),
            ("photos/class0/image001.jpg\nphotos/class0/image001.jpg\n", 2, "line 1 too"),
        ],
    )
    def test_bad_lines_are_named(self, photos, tmp_path, text, line, what):
        (tmp_path / "list.txt").write_text(text)
        error = refused(tmp_path / "list.txt")
        assert what in error.what
        assert error.where.endswith(f"list.txt, line {line}")

    def test_no_list(self, tmp_path):
        (tmp_path / "list.txt").write_text("\n\n")
        assert "empty" in refused(tmp_path / "list.txt").what
        (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
        assert "UTF-8" in refused(tmp_path / "list.txt").what


class TestGroundTruth:
    @pytest.fixture
    def flat(self, photos, tmp_path) -> tuple[Path, list[str]]:
        """The images as ImageNet's validation archive has them, and their classes in the order of the names."""
        order = sorted(photos, key=lambda name: name.split("/")[1])
        names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 13)]
        (tmp_path / "val.tar").write_bytes(
            tar_bytes({name: photos[path] for name, path in reversed(list(zip(names, order, strict=True)))})
        )
        for name, path in zip(names, order, strict=True):
            goal = tmp_path / "sorted" / path.split("/")[0] / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(photos[path])
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
        (shards,) = shard_images(archive, tmp_path / "out", ALONE, Silent(), labels=labels)
        assert contents(shards.root) == expected

    def test_the_official_archives_in_one_folder(self, flat, photos, tmp_path):
        archive, truth = flat
        folder = tmp_path / "imagenet"
        folder.mkdir()
        archive.rename(folder / "ILSVRC2012_img_val.tar")
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(class_tars(photos)))
        assert find_splits(folder).keys() == {"train", "val"}
        with pytest.raises(SourceError) as caught:
            shard_images(folder, tmp_path / "out", ALONE, Silent())
        assert "--labels ILSVRC2012_devkit_t12.tar.gz" in caught.value.fix
        (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(truth))
        train, val = shard_images(folder, tmp_path / "out", ALONE, Silent())
        assert (train.root.name, val.root.name) == ("train", "val")
        assert train.classes == val.classes == ["class0", "class1", "class2"]

    def test_what_does_not_fit(self, flat, photos, tmp_path):
        archive, truth = flat
        (tmp_path / "short.txt").write_text("\n".join(truth[:-1]))
        assert "11 labels, and the source 12" in refused(archive, labels=tmp_path / "short.txt").what
        (tmp_path / "numbers.txt").write_text("1\n2\n")
        assert "development kit" in refused(archive, labels=tmp_path / "numbers.txt").what
        (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(tar_bytes({"x": b""})))
        assert "holds no" in refused(archive, labels=tmp_path / "kit.tar.gz").what
        (tmp_path / "s.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 1 1 1\n")
        assert "11 images have no label" in refused(archive, labels=tmp_path / "s.csv").what
        endless = tar_bytes({"x": b"1" * 600}, format=tarfile.PAX_FORMAT, pax_headers={"size": "-1536"})
        (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(endless))
        assert "contradict" in refused(archive, labels=tmp_path / "kit.tar.gz").what
        assert "no such file" in refused(archive, labels=tmp_path / "none").what
        assert "have classes already" in refused(tmp_path / "photos", labels=tmp_path / "short.txt").what


class TestExpected:
    def reference(self, tmp_path: Path, images: int = 12) -> str:
        names = {f"class{n}": f"words of {n}, more" for n in range(3)}
        data = {"name": "three", "splits": {"train": {"images": images}, "val": {"images": 3}}, "classes": names}
        (tmp_path / "three.json").write_text(json.dumps(data))
        return str(tmp_path / "three.json")

    def test_a_source_that_is_whole(self, photos, tmp_path):
        source = scan(tmp_path / "photos")
        check_expected(source, self.reference(tmp_path))
        check_expected(source, self.reference(tmp_path) + "/train")

    def test_what_is_missing_is_named(self, photos, tmp_path):
        for path in (tmp_path / "photos" / "class1").iterdir():
            path.unlink()
        (tmp_path / "photos" / "class1").rename(tmp_path / "photos" / "other")
        (tmp_path / "photos" / "other" / "1.jpg").write_bytes(photos["class1/image000.jpg"])
        with pytest.raises(SourceError) as caught:
            check_expected(scan(tmp_path / "photos"), self.reference(tmp_path), "val")
        assert caught.value.what == (
            "this is not three/val: 1 of its 3 classes are missing: class1 (words of 1); "
            "1 classes are not its own: other; there are 9 images instead of 3"
        )

    def test_names_of_manifests(self, photos, tmp_path):
        source = scan(tmp_path / "photos")
        for bad in ("imagenet2k", "imagenet1k/test"):
            with pytest.raises(SettingsError):
                check_expected(source, bad)
        (tmp_path / "bad.json").write_text("[]")
        with pytest.raises(SettingsError, match="no reference manifest"):
            check_expected(source, str(tmp_path / "bad.json"))

    def test_imagenet_on_the_command_line(self, photos, tmp_path):
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
