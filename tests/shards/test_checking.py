"""Images are checked by decoding, with and without workers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
from PIL import Image

from cae2pipe.errors import SourceError, WorkerError
from cae2pipe.shards.checking import FileSlice, check_image, checking, read_piece


@pytest.fixture
def files(tmp_path):
    """40 images, of which every seventh is text."""
    paths = [tmp_path / f"{n:02d}.jpg" for n in range(40)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path) if number % 7 else path.write_text("text")
    return [FileSlice(path, 0, path.stat().st_size) for path in paths]


def test_workers_start_without_the_heavy_libraries():
    code = (
        "import sys, cae2pipe.shards.checking; print(*{'torch', 'webdataset', 'pydantic', 'zarr'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_reasons_come_in_order_and_are_the_same_with_workers(files):
    with checking(0) as check:
        alone = list(check(files))
    with checking(2) as check:
        together = list(check(files))
    assert alone == together
    assert [image.reason is not None for image in alone] == [number % 7 == 0 for number in range(40)]
    assert [image.data for image in alone] == [piece.file.read_bytes() for piece in files]
    assert alone[0].reason.startswith("this image cannot be decoded")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_no_reject(files, workers):
    files[20].file.unlink()
    files[20].file.mkdir()
    with pytest.raises(SourceError, match="cannot be read") as caught, checking(workers) as check:
        list(check(files))
    assert caught.value.where == str(files[20].file)


def test_what_cannot_be_decoded_is_told_without_its_place(files):
    # Reasons are written to rejects.jsonl, which must not contain local folders.
    assert check_image(files[1]).reason is None
    assert str(files[0].file.parent) not in check_image(files[0]).reason


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_than_was_scanned(files, change):
    with pytest.raises(SourceError, match="has changed since the source was scanned"):
        read_piece(files[1]._replace(size=files[1].size + change))


def test_a_piece_of_an_archive_is_read_by_its_range(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert read_piece(FileSlice(tmp_path / "a.tar", 3, 4, "b.jpg")) == b"3456"
    with pytest.raises(SourceError, match="has changed") as caught:
        read_piece(FileSlice(tmp_path / "a.tar", 8, 4, "b.jpg"))
    assert caught.value.where == f"{tmp_path / 'a.tar'}, member b.jpg"


class Ends:
    """Ends the worker that unpickles it, with this exit code."""

    def __init__(self, code: int):
        self.code = code

    def __reduce__(self):
        return os._exit, (self.code,)


def test_a_worker_that_ends_by_an_error_is_not_called_killed(files):
    before = r"ended before it returned anything \(exit code 3\)"
    with pytest.raises(WorkerError, match=before) as caught, checking(2) as check:
        list(check([FileSlice(Ends(3), 0, 1)]))
    assert "see its output above" in caught.value.fix
    with pytest.raises(WorkerError, match=r"ended by an error \(exit code 3\)") as caught, checking(1) as check:
        list(check([*files, FileSlice(Ends(3), 0, 1)]))
    assert "see its output above" in caught.value.fix
    assert "memory" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_workers_are_there_before_the_first_image(workers):
    # One that is started later is not protected from Ctrl-C while it starts, and nobody learns why it ended.
    others = set(multiprocessing.active_children())
    with checking(workers):
        assert len(set(multiprocessing.active_children()) - others) == workers


def test_a_killed_worker_is_an_error_with_a_remedy(files):
    def kill_one():
        others = set(multiprocessing.active_children())
        with checking(1) as check:
            for number, _ in enumerate(check(files * 4)):
                if number == 8:
                    (worker,) = set(multiprocessing.active_children()) - others
                    worker.kill()

    with pytest.raises(WorkerError, match="killed by SIGKILL, perhaps because memory ran out") as caught:
        kill_one()
    assert "--workers" in caught.value.fix
