"""Running out of memory is never reported as damage. The limits are real ones of the operating system."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.artifacts.retries import remotely
from cae2pipe.errors import StorageError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from tests.faults.short_of_memory import READERS, limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits and /proc are Linux's")


@pytest.fixture(scope="module")
def short_of_memory(tmp_path_factory) -> dict[str, str]:
    """Outcomes of reading with too little memory, by kind of file."""
    command = [sys.executable, "-m", "tests.faults.short_of_memory", str(tmp_path_factory.mktemp("memory"))]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", list(READERS))
def test_too_little_memory_is_not_blamed_on(name, short_of_memory):
    outcome = short_of_memory[name]
    assert outcome.startswith(("MemoryError: ", "RuntimeError: [enforce fail at alloc_cpu"))
    # Only memory was lacking; the record is just large.
    assert outcome.endswith(", then read") or name == "the record of a failed step"


def test_too_many_open_files_are_not_blamed_on_what_is_opened(target_root):
    from cae2pipe.shards.tar import index_tar, read_tar_range
    from cae2pipe.targets.target_set import TargetSet

    targets = TargetSet(target_root)
    reader = targets.reader(min(targets.stores))
    tar = reader.tar
    for read in (lambda: index_tar(tar), lambda: read_tar_range(tar, 0, 10), lambda: reader.arrays(0)):
        with limited(resource.RLIMIT_NOFILE, 0), pytest.raises(StorageError, match="too many files") as caught:
            read()
        assert "ulimit -n" in str(caught.value.fix)


def test_too_many_open_files_are_not_blamed_on_the_calibration(target_root, monkeypatch):
    from cae2pipe.targets import stored_calibration

    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(stored_calibration, "read_bytes", read_bytes)
    with pytest.raises(StorageError, match="too many files"):
        stored_calibration.read_calibration(open_artifact(target_root))


def test_a_remote_storage_is_not_blamed_for_the_memory_here():
    def call() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        remotely(Path("x"), call)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_machines_failure_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        reraise_exhaustion(error)
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), RuntimeError("x"), ValueError("x"), FileNotFoundError(errno.ENOENT, "x")]
)
def test_what_is_not_the_machines_is_left_to_the_caller(error):
    reraise_exhaustion(error)


def test_refusing_an_image_does_not_load_torch():
    code = (
        "import sys\n"
        "from cae2pipe.errors import ImageError\n"
        "from cae2pipe.images.decode import decode_rgb\n"
        "try:\n    decode_rgb(b'text', 'x')\nexcept ImageError:\n    sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
