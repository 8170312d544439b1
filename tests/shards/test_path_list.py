"""Lists of paths as sources."""

from __future__ import annotations

import pytest

from cae2pipe.shards.checking import read_piece
from cae2pipe.shards.source import scan
from tests.shards.archives import refused


class TestLists:
    def test_paths_alone_and_from_elsewhere(self, photo_files, tmp_path):
        path = tmp_path / "list.txt"
        path.write_text(f"photos/class0/image001.jpg\n\n{tmp_path}/photos/class1/image002.jpg\r\n")
        source = scan(path)
        assert source.classes == []
        assert [read_piece(source.piece(e)) for e in source.entries] == [
            photo_files["class1/image002.jpg"],
            photo_files["class0/image001.jpg"],
        ]

    @pytest.mark.parametrize(
        ("text", "line", "what"),
        [
            ("photos/class0/image001.jpg\nphotos/none.jpg\n", 2, "no such file"),
            ("photos/class0/image001.jpg\tcat\nphotos/class0/image002.jpg\n", 2, "some lines"),
            ("photos/class0/image001.jpg\nphotos/class0/image001.jpg\n", 2, "also in line 1"),
        ],
    )
    def test_bad_lines_are_named(self, photo_files, tmp_path, text, line, what):
        (tmp_path / "list.txt").write_text(text)
        error = refused(tmp_path / "list.txt")
        assert what in error.what
        assert error.where.endswith(f"list.txt, line {line}")

    def test_no_list(self, tmp_path):
        (tmp_path / "list.txt").write_text("\n\n")
        assert "empty" in refused(tmp_path / "list.txt").what
        (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
        assert "UTF-8" in refused(tmp_path / "list.txt").what
