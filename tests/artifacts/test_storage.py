"""Remote storage: exact ranges, retries, clear errors, exclusive creation. On fsspec's memory file system."""

from __future__ import annotations

import errno
import importlib.util
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from cae2pipe.artifacts import retries
from cae2pipe.artifacts.digest import sha256_file
from cae2pipe.artifacts.retries import remotely
from cae2pipe.artifacts.storage import (
    create_exclusively,
    fetch_file,
    file_size,
    file_sizes,
    is_local,
    put_bytes,
    put_file,
    read_bytes,
    read_many,
    read_range,
    remove,
    to_path,
)
from cae2pipe.errors import BadInputError, StorageError

READERS: list[Callable[[Path, Path], object]] = [
    lambda path, copy: read_bytes(path),
    lambda path, copy: sha256_file(path),
    lambda path, copy: read_range(path, 0, 1),
    fetch_file,
]


@pytest.fixture
def remote() -> Path:
    return to_path(f"memory://{uuid.uuid4().hex}")


def test_paths_stay_paths_and_urls_become_places(remote: Path) -> None:
    assert to_path("a/b") == Path("a/b")
    assert is_local(to_path("a/b"))
    assert not is_local(remote)
    assert not is_local(remote / "x")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(BadInputError, match="cannot be opened"):
        to_path("nowhere://x")


@pytest.mark.parametrize(("text", "package"), [("gs://bucket/set", "gcsfs"), ("abfs://store/set", "adlfs")])
def test_the_package_of_a_file_system_is_named(text, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(BadInputError, match="cannot be opened") as caught:
        to_path(text)
    assert f"pip install {package}, " in str(caught.value.fix)


def test_an_upload_tells_how_far_it_is(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 20_000_000)
    moved: list[int] = []
    put_file(tmp_path / "file", remote / "file", moved.append)
    assert sum(moved) == file_size(remote / "file") == 20_000_000
    assert len(moved) > 1


@pytest.mark.parametrize("text", ["http://", "s3:///", "://x", "memory://"])
def test_a_url_that_names_nothing_is_refused(text):
    with pytest.raises(BadInputError, match="names nothing"):
        to_path(text)


def test_files_are_written_listed_read_by_range_and_removed(remote: Path) -> None:
    put_bytes(remote / "a" / "b", b"0123456789")
    put_bytes(remote / "c", b"x")
    assert file_sizes(remote) == {"a/b": 10, "c": 1}
    assert read_range(remote / "a" / "b", 3, 4) == b"3456"
    assert read_range(remote / "a" / "b", 8, 4) == b"89"
    assert read_many([remote / "c", remote / "gone"]) == {remote / "c": b"x"}
    remove([remote / "c", remote / "gone"])
    assert file_size(remote / "c") is None
    assert file_size(remote / "a") is None, "a folder is not a file"
    assert file_sizes(remote / "nothing") == {}


def test_a_file_is_created_exclusively_once(remote: Path) -> None:
    assert create_exclusively(remote / "claim", b"1")
    assert not create_exclusively(remote / "claim", b"2")
    assert read_range(remote / "claim", 0, 1) == b"1"


def test_what_may_pass_is_tried_again_and_then_succeeds() -> None:
    waits: list[float] = []
    answers = [TimeoutError("slow"), OSError(errno.EBUSY, "SlowDown"), ConnectionResetError()]

    def call() -> str:
        if answers:
            raise answers.pop(0)
        return "done"

    assert remotely(Path("x"), call, waits.append) == "done"
    assert waits == list(retries.WAITS[:3])


def test_what_does_not_pass_is_explained_after_all_tries() -> None:
    waits: list[float] = []

    def call() -> None:
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="did not answer in 5 tries: no answer") as caught:
        remotely(Path("x"), call, waits.append)
    assert waits == list(retries.WAITS)
    assert "same command" in str(caught.value.fix)


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), type("NoCredentialsError", (Exception,), {})("none")])
def test_refused_access_is_not_tried_again(error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(BadInputError, match="refuses access") as caught:
        remotely(Path("x"), call, lambda _: pytest.fail("waited"))
    assert "credentials" in str(caught.value.fix)


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("fifo", "link"):
        for read in READERS:
            with pytest.raises(OSError, match="not a regular file"):
                read(tmp_path / name, tmp_path / "copy")
    for read in READERS:
        with pytest.raises(IsADirectoryError):
            read(tmp_path, tmp_path / "copy")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_linked_file_is_brought_as_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("store/file")
    fetch_file(tmp_path / "link", tmp_path / "store" / "copy")
    assert not (tmp_path / "store" / "copy").is_symlink()
    assert (tmp_path / "store" / "copy").read_bytes() == b"data"
    fetch_file(tmp_path / "store" / "file", tmp_path / "store" / "name")
    assert (tmp_path / "store" / "name").samefile(tmp_path / "store" / "file")


def test_no_more_is_read_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123")
    assert read_range(tmp_path / "file", 2, 2**62) == b"23"
    assert read_range(tmp_path / "file", 2**62, 2**62) == b""


@pytest.mark.parametrize("text", ["s3:/bucket/set", "file:/tmp/x", "GS:/b", Path("s3://bucket/set"), Path("file:///x")])
def test_a_url_that_lost_a_slash_is_no_folder(text):
    with pytest.raises(BadInputError, match="one slash too few"):
        to_path(text)
    assert to_path("/tmp/s3:/bucket") == Path("/tmp/s3:/bucket")
    assert to_path("notes:/x") == Path("notes:/x")
