"""Archives as sources: every form gives the same images as the folder, and nothing is unpacked."""

from __future__ import annotations

import io
import tarfile

import pytest

from cae2pipe.artifacts.storage import to_path
from cae2pipe.errors import SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.checking import read_piece
from cae2pipe.shards.source import scan
from tests.shards.archives import ALONE, class_tars, packed, refused, tar_bytes, tree


def test_every_form_gives_the_same_shard_set_as_the_folder(photo_files, tmp_path):
    expected = packed(tmp_path / "photos", tmp_path / "expected")
    (tmp_path / "nested.tar").write_bytes(tar_bytes(class_tars(photo_files)))
    (tmp_path / "flat.tar").write_bytes(tar_bytes(photo_files))
    (tmp_path / "deep.tar").write_bytes(tar_bytes({f"./data/train/{name}": data for name, data in photo_files.items()}))
    (tmp_path / "pax.tar").write_bytes(tar_bytes(photo_files, format=tarfile.PAX_FORMAT))
    (tmp_path / "tars").mkdir()
    for name, data in class_tars(photo_files).items():
        (tmp_path / "tars" / name).write_bytes(data)
    (tmp_path / "photos" / "list.txt").write_text("".join(f"{name}\t{name.split('/')[0]}\n" for name in photo_files))
    sources = ["nested.tar", "flat.tar", "deep.tar", "pax.tar", "tars", "photos/list.txt"]
    for number, source in enumerate(sources):
        assert packed(tmp_path / source, tmp_path / str(number)) == expected, source


def test_nothing_is_unpacked_and_hidden_files_are_passed_over(photo_files, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({**photo_files, "class0/._image000.jpg": b"x", ".DS_Store": b"x", "readme.txt": b"x"}))
    source = scan(path)
    assert [entry.path for entry in source.entries] == sorted(photo_files)
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photo_files


def test_an_archive_on_another_place(photo_files, tmp_path):
    remote = to_path("memory://archives/nested.tar")
    remote.write_bytes(tar_bytes(class_tars(photo_files)))
    source = scan(remote)
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photo_files
    for name, data in photo_files.items():
        to_path(f"memory://folder/{name}").write_bytes(data)
    source = scan(to_path("memory://folder"))
    assert source.classes == ["class0", "class1", "class2"]
    assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photo_files


def test_member_names_are_no_paths(tmp_path, photo_files):
    image = next(iter(photo_files.values()))
    path = tmp_path / "evil.tar"
    path.write_bytes(tar_bytes({"/etc/passwd.jpg": image, "/etc/\x1b[31m\n.jpg": image}))
    before = tree(tmp_path)
    shards = build_shard_set(path, tmp_path / "out", ALONE, report=Silent())
    assert shards.images == 2
    assert shards.classes == ["etc"]
    assert {name for name in tree(tmp_path) if not name.startswith("out/")} == set(before)
    keys = {sample.key for shard in shards.shards for sample in shards.index(shard)}
    assert keys == {"etc+passwd", "etc+~1b~5b31m~0a"}
    for name in ("a/../../../evil.jpg", "../evil.jpg", "a/../b.txt"):
        path.write_bytes(tar_bytes({"a/1.jpg": image, name: image}))
        assert "points outside of the archive" in refused(path).what


def joined(*tars: dict[str, bytes], between: int = 0) -> bytes:
    return bytes(between).join(map(tar_bytes, tars))


class TestJoined:
    """``cat a.tar b.tar``: a second archive after the end of the first."""

    def test_all_images_are_taken_and_the_user_is_told(self, photo_files, tmp_path):
        halves = dict(list(photo_files.items())[:5]), dict(list(photo_files.items())[5:])
        path = tmp_path / "a.tar"
        for between in (0, 512, 10 * 2**20):
            path.write_bytes(joined(*halves, between=between))
            source = scan(path)
            assert {entry.path: read_piece(source.piece(entry)) for entry in source.entries} == photo_files
            assert source.remarks() == [f"{path} consists of 2 concatenated archives: all are read"]

    def test_inside_another_archive(self, photo_files, tmp_path):
        tars = class_tars(photo_files)
        more = tar_bytes({"more.jpg": photo_files["class0/image000.jpg"]})
        (tmp_path / "a.tar").write_bytes(tar_bytes({name: data + more for name, data in tars.items()}))
        assert len(scan(tmp_path / "a.tar").entries) == 15

    def test_what_follows_the_end_and_is_no_archive(self, photo_files, tmp_path):
        path = tmp_path / "a.tar"
        whole = tar_bytes(photo_files)
        for rest in (b"x" * 512, bytes(100) + b"x", bytes(2**20) + b"\1"):
            path.write_bytes(whole + rest)
            assert "is not a tar" in refused(path).what
        images = list(photo_files.items())
        path.write_bytes(tar_bytes(dict(images[:5])).rstrip(b"\0") + bytes(512) + tar_bytes(dict(images[5:])))
        with pytest.raises(SourceError, match=r"damaged|truncated|not a tar"):
            scan(path)

    def test_a_tar_without_an_end(self, photo_files, tmp_path):
        whole = tar_bytes(photo_files)
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        (tmp_path / "a.tar").write_bytes(whole[:end])
        source = scan(tmp_path / "a.tar")
        assert len(source.entries) == 12
        assert "no end mark" in source.remarks()[0]

    def test_an_inner_tar_without_an_end_does_not_read_the_next(self, photo_files, tmp_path):
        bare = {
            name: data[: len(data.rstrip(b"\0")) // 512 * 512 + 512] for name, data in class_tars(photo_files).items()
        }
        (tmp_path / "a.tar").write_bytes(tar_bytes(bare))
        assert [entry.label for entry in scan(tmp_path / "a.tar").entries] == [0] * 4 + [1] * 4 + [2] * 4
