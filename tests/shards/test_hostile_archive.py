"""Broken and malicious archives: one clear error, or the correct images."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cae2pipe.errors import SourceError
from cae2pipe.shards.checking import read_piece
from cae2pipe.shards.source import scan
from tests.shards.archives import class_tars, refused, tar_bytes


class TestBroken:
    def test_cut_off(self, photo_files, tmp_path):
        path = tmp_path / "a.tar"
        data = tar_bytes(class_tars(photo_files))
        for share in (0.2, 0.5, 0.75):
            path.write_bytes(data[: int(len(data) * share)])
            assert "checksum" in refused(path).fix

    def test_a_broken_header(self, photo_files, tmp_path):
        path = tmp_path / "a.tar"
        data = bytearray(tar_bytes(photo_files))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            offset = tar.getmembers()[4].offset
        data[offset + 150] ^= 1  # in the header's checksum
        path.write_bytes(data)
        assert refused(path).what == f"the archive is damaged at byte {offset}"

    def test_compressed(self, photo_files, tmp_path):
        (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(photo_files)))
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

    def test_forms_that_mix(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        path = tmp_path / "a.tar"
        path.write_bytes(tar_bytes({**class_tars(photo_files), "x.jpg": image}))
        assert "both tars" in refused(path).what
        path.write_bytes(tar_bytes({**photo_files, "x.jpg": image}))
        assert "outside of class folders" in refused(path).what
        path.write_bytes(tar_bytes({"train/a/1.jpg": image, "val/a/1.jpg": image}))
        assert "splits train, val" in refused(path).what
        path.write_bytes(tar_bytes({"a.tar": tar_bytes({"1.jpg": image}), "b.tar": tar_bytes({"x.txt": b""})}))
        assert "'b' holds no images" in refused(path).what
        path.write_bytes(tar_bytes({"x.txt": b""}))
        assert "no images" in refused(path).what


class TestHostile:
    """Malicious headers: one clear error, or the correct images; never a loop, a long list or a traceback."""

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
    def test_sizes(self, photo_files, tmp_path, size):
        image = photo_files["class0/image000.jpg"]
        refused(self.tar(tmp_path / "a.tar", image, pax_headers={"size": size}))

    def test_extended_headers_that_take_long(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        error = refused(self.tar(tmp_path / "a.tar", image, pax_headers={"comment": "1" * 2**19}))
        assert "255 digits" in error.what
        error = refused(self.tar(tmp_path / "a.tar", image, pax_headers={"comment": "a" * 2**21}))
        assert "a header of" in error.what

    def test_a_chain_of_extended_headers(self, photo_files, tmp_path):
        header = tarfile.TarInfo("x")
        header.type = tarfile.XHDTYPE
        data = header.tobuf(tarfile.USTAR_FORMAT) * 5000 + tar_bytes(photo_files)
        (tmp_path / "a.tar").write_bytes(data)
        assert "cannot be read" in refused(tmp_path / "a.tar").what

    def test_sizes_for_all_members(self, photo_files, tmp_path):
        data = tar_bytes(photo_files, format=tarfile.PAX_FORMAT, pax_headers={"size": "10"})
        (tmp_path / "a.tar").write_bytes(data)
        assert "contradict" in refused(tmp_path / "a.tar").what

    def test_what_bears_an_image_s_name_and_is_no_file(self, photo_files, tmp_path):
        image = photo_files["class0/image000.jpg"]
        for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
            error = refused(self.tar(tmp_path / "a.tar", b"", type=kind))
            assert "is not a file" in error.what
        self.tar(tmp_path / "a.tar", image, type=b"M")
        assert "another volume" in refused(tmp_path / "a.tar").what

    def test_very_deep_names(self, photo_files, tmp_path):
        (tmp_path / "a.tar").write_bytes(tar_bytes({"d/" * 100_000 + "0.jpg": photo_files["class0/image000.jpg"]}))
        assert len(scan(tmp_path / "a.tar").entries) == 1

    def test_pipes_instead_of_archives(self, photo_files, tmp_path):
        (tmp_path / "tars").mkdir()
        os.mkfifo(tmp_path / "tars" / "a.tar")
        assert "is not a file" in refused(tmp_path / "tars").what
        (tmp_path / "tars" / "a.tar").unlink()
        (tmp_path / "tars" / "a.tar").write_bytes(
            tar_bytes({"1.jpg": photo_files["class0/image000.jpg"], "1.cls": b"0"})
        )
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
        """Any change to one header of a real tar, with a matching checksum."""
        photo_files = {f"class{number % 3}/{number}.jpg": b"%d" % number * 400 for number in range(12)}
        whole = bytearray(tar_bytes(photo_files, format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT))
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
            read = [read_piece(source.piece(entry)) for entry in source.entries]
            assert set(read) <= set(photo_files.values())
            # A member with the type of a folder or an extended header is one; no reader can detect the change.
            assert len(read) + source.passed_over.total() >= len(photo_files) - (field == (156, 1))
            return
        assert error.where
        assert error.fix
