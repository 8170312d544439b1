"""Images are proved to decode, by workers or without."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
from PIL import Image

from cae2pipe.errors import Cae2pipeError, SourceError
from cae2pipe.shards.checking import check_image, checking


@pytest.fixture
def files(tmp_path):
    """40 images, of which every seventh is text."""
    paths = [tmp_path / f"{n:02d}.jpg" for n in range(40)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path) if number % 7 else path.write_text("text")
    return paths


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
    assert [reason is not None for reason in alone] == [number % 7 == 0 for number in range(40)]
    assert alone[0].startswith("this image cannot be decoded")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_no_reject(files, workers):
    files[20].unlink()
    files[20].mkdir()
    with pytest.raises(SourceError, match="cannot be read") as caught, checking(workers) as check:
        list(check(files))
    assert caught.value.where == str(files[20])


def test_what_cannot_be_decoded_is_told_without_its_place(files):
    # Reasons go into rejects.jsonl, which names no folder of this machine.
    assert check_image(files[1]) is None
    assert str(files[0].parent) not in check_image(files[0])


def test_a_killed_worker_is_an_error_with_a_remedy():
    with pytest.raises(Cae2pipeError, match="killed") as caught, checking(1):
        raise BrokenProcessPool
    assert "--workers" in caught.value.fix
