"""Tars: equal samples give equal bytes, WebDataset reads them, and a truncated tar is never read as a shorter one."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.errors import DamageError
from cae2pipe.shards.tar import index_tar, read_tar_range, write_samples

SAMPLES = [("cat+1", 0, b"a" * 700), ("dog+2", 12, b""), ("~c3~a9", -1, b"b" * 512), ("k" * 80, 999, b"\0" * 3)]


def write(path: Path, samples=SAMPLES) -> Path:
    write_samples(path, samples)
    return path


def plain_tar(path: Path, members: list[tuple[str, bytes]], **changes) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_index_leads_to_every_image(tmp_path):
    path = write(tmp_path / "x.tar")
    index = index_tar(path)
    assert [(s.key, s.label, read_tar_range(path, s.offset, s.size)) for s in index] == SAMPLES


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 10**6), st.binary(max_size=2000)), max_size=6))
def test_whatever_is_written_is_read(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    samples = [(f"k{number}", label, data) for number, (label, data) in enumerate(contents)]
    write(path, samples)
    assert [(s.key, s.label, read_tar_range(path, s.offset, s.size)) for s in index_tar(path)] == samples


def test_members_bear_nothing_of_the_machine_or_the_time(tmp_path):
    first, second = write(tmp_path / "a.tar"), write(tmp_path / "b.tar")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"{key}.{kind}" for key, _, _ in SAMPLES for kind in ("cls", "jpg")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "bigdata", "bigdata", 0o444)
    }


def test_images_lie_side_by_side(tmp_path):
    # One ranged read fetches many: between two images there are only a label and two headers.
    index = index_tar(write(tmp_path / "x.tar", [(f"k{n}", n, b"x" * 1000) for n in range(20)]))
    assert {after.offset - before.offset for before, after in pairwise(index)} == {1024 + 3 * 512}


def test_webdataset_reads_it(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    path = write(tmp_path / "x.tar", [("cat+1", 3, b"one"), ("dog+2", -1, b"two")])
    with path.open("rb") as file:
        members = tar_file_expander([{"url": str(path), "stream": file}])
        read = [(s["__key__"], s["cls"], s["jpg"]) for s in group_by_keys(members)]
    assert read == [("cat+1", b"3", b"one"), ("dog+2", b"-1", b"two")]


def test_a_tar_cut_anywhere_is_damaged(tmp_path):
    whole = write(tmp_path / "x.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 512, 256):
        cut.write_bytes(whole[:length])
        with pytest.raises(DamageError) as caught:
            index_tar(cut)
        assert caught.value.where == str(cut)


def test_a_tar_with_a_broken_header_is_damaged(tmp_path):
    path = write(tmp_path / "x.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for place in headers:
        broken = bytearray(whole)
        broken[place + 5] ^= 1
        path.write_bytes(broken)
        with pytest.raises(DamageError):
            index_tar(path)


def test_members_that_do_not_pair(tmp_path):
    for members in (
        [("a.jpg", b"x")],
        [("a.cls", b"1")],
        [("a.jpg", b"x"), ("b.cls", b"1")],
        [("a.jpg", b"x"), ("a.cls", b"1"), ("a.jpg", b"y")],
        [("a.jpg", b"x"), ("a.cls", b"1"), ("a.txt", b"t")],
        [("a.jpg", b"x"), ("a.cls", b"one")],
        [("a.jpg", b"x"), ("a.cls", b"")],
        [("a.jpg", b"x"), ("a.cls", b"1"), ("../../etc/passwd", b"x")],
    ):
        with pytest.raises(DamageError) as caught:
            index_tar(plain_tar(tmp_path / "x.tar", members))
        assert caught.value.where == str(tmp_path / "x.tar"), members


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_not_plain_files(tmp_path, kind):
    path = plain_tar(tmp_path / "x.tar", [("a.cls", b""), ("a.jpg", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(DamageError, match="not a plain file"):
        index_tar(path)


@pytest.mark.parametrize("data", [b"", b"text", b"\x1f\x8b" + b"\0" * 2000, b"x" * 2000])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(DamageError):
        index_tar(tmp_path / "x.tar")


def test_no_file_and_a_range_beyond_the_end(tmp_path):
    with pytest.raises(DamageError, match="No such file"):
        index_tar(tmp_path / "none.tar")
    with pytest.raises(DamageError, match="No such file"):
        read_tar_range(tmp_path / "none.tar", 0, 1)
    (tmp_path / "x.tar").write_bytes(b"12345")
    with pytest.raises(DamageError, match="2 bytes too early"):
        read_tar_range(tmp_path / "x.tar", 3, 4)


@pytest.mark.parametrize("size", ["-1536", str(10**18), "zebra"])
def test_headers_that_lie_are_damage(tmp_path, size):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("a.cls", {}), ("a.jpg", {"size": size})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 1, headers
            tar.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(DamageError):
        index_tar(path)


def test_what_follows_the_end_is_damage(tmp_path):
    path = write(tmp_path / "x.tar")
    whole = path.read_bytes()
    for rest in (b"x", bytes(2**20) + b"x", whole):
        path.write_bytes(whole + rest)
        with pytest.raises(DamageError):
            index_tar(path)
