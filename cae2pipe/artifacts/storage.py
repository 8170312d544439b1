"""Storage: local paths, and URLs of any file system that fsspec knows (s3://, gs://, hf://, memory://).

A path is a ``pathlib.Path`` or, for a URL, a ``upath.UPath``, which has the same methods; annotations say ``Path`` for
both. All access to remote bytes goes through the functions here: they read exact ranges, and retry or explain errors
(``retries``). Credentials and endpoints come from where fsspec looks for them (AWS_PROFILE, AWS_ENDPOINT_URL,
~/.config/fsspec, ...), never from a manifest.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, cast
from urllib.parse import unquote

from cae2pipe.artifacts.retries import remotely
from cae2pipe.errors import BadInputError, StorageError

LOCAL = ("file", "local")
"""Protocols of URLs that name local paths."""
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "oci": "ocifs",
    "http": "aiohttp",
    "https": "aiohttp",
    "webhdfs": "requests",
    "hdfs": "pyarrow",
}
"""The packages that protocols need."""
SHORTENED = re.compile(
    "(file|local|s3a?|gc?s|az|abfss?|adl|hf|https?|memory|s?ftp|ssh|(web)?hdfs|oci):/", re.IGNORECASE
)
"""The beginning of a path that pathlib made of a URL."""


def to_path(text: str | os.PathLike[str]) -> Path:
    """A path object of a path or URL. ``file://`` URLs are local paths.

    Raises:
        BadInputError: it is neither, or no file system of that protocol is known or installed.
    """
    if is_remote(text):
        return cast(Path, text)
    text = plain_text(text)
    if "://" not in text:
        if SHORTENED.match(text):
            raise BadInputError(
                "this looks like a URL with one slash too few",
                where=text,
                fix="give the URL as a str, with two slashes (a Path drops one), or an absolute path",
            )
        return Path(text)
    protocol, _, rest = text.partition("://")
    if protocol.lower() in LOCAL:
        return local_path(text, rest)
    if not protocol or not rest.strip("/"):
        raise BadInputError("this URL names nothing", where=text, fix="give PROTOCOL://BUCKET/FOLDER, or a path")
    # Not imported for local work.
    from upath import UPath

    try:
        # Listings are not cached: other machines write here too.
        remote = UPath(text, use_listings_cache=False)
        _ = remote.fs
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(protocol.lower())
        raise BadInputError(
            f"this URL cannot be opened: {error}",
            where=text,
            fix=f"pip install {package}, or correct the URL"
            if package
            else "correct the URL, or install the package of this file system",
        ) from None
    return cast(Path, remote)


def plain_text(path: str | os.PathLike[str]) -> str:
    """A path or URL as text. Raises BadInputError for anything else."""
    if not isinstance(path, str | os.PathLike):
        raise BadInputError(f"{path!r} is not a path", fix="give a path or a URL, as a str or a Path")
    return os.fsdecode(path)


def local_path(url: str, rest: str) -> Path:
    """The path that a ``file://`` URL names: ``rest`` is what follows, with escapes such as ``%20``.

    Raises:
        BadInputError: it names another machine, or a relative path.
    """
    machine, slash, path = rest.partition("/")
    if machine not in ("", "localhost") or not slash:
        raise BadInputError(
            "this URL names no local path", where=url, fix="give file:///FOLDER, with three slashes, or a path"
        )
    return Path(slash + unquote(path))


def to_local_path(text: str | os.PathLike[str], *, output: bool = False) -> Path:
    """A path object of a local path, or of its ``file://`` URL, for what cannot be remote. ``output``: whether it is
    written to.

    Raises:
        BadInputError: it is neither.
    """
    protocol, found, _ = ("", "://", "") if is_remote(text) else plain_text(text).partition("://")
    if found and protocol.lower() not in LOCAL:
        raise BadInputError(
            "this is a URL, and a local path is needed here",
            where=text,
            fix="give a local folder, and copy it to the URL when it is finished"
            if output
            else "copy what is there to a local path, and give that",
        )
    return to_path(text)


def is_local(path: Path) -> bool:
    return isinstance(path, PurePath)


def is_remote(value: object) -> bool:
    """Whether a value is a path object of a remote file system."""
    upath = sys.modules.get("upath")  # which makes them
    return upath is not None and isinstance(value, upath.UPath) and not isinstance(value, os.PathLike)


def is_shared(path: Path) -> bool:
    """Whether other processes can access this path: ``memory://`` is local to this process."""
    return is_local(path) or cast(Any, path).protocol != "memory"


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises FileNotFoundError if it does not exist, another OSError if it is not a regular file."""
    if is_local(path):
        with open_file(path) as file:
            return file.read()
    fs, name = _remote(path)
    data: bytes = remotely(path, lambda: fs.cat_file(name))
    return data


def open_file(path: Path) -> io.BufferedReader:
    """A local regular file, opened for reading.

    Raises:
        OSError: FileNotFoundError if it does not exist; IsADirectoryError; EINVAL for FIFOs, sockets and devices, which
            would block.
    """
    return os.fdopen(_open(path)[0], "rb")


def _open(path: Path) -> tuple[int, int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "This is not a regular file", str(path))
    return descriptor, status.st_size


def read_many(paths: list[Path]) -> dict[Path, bytes]:
    """Whole files, without those that no longer exist; remote files by one round of concurrent requests."""
    files = {}
    if paths and not is_local(paths[0]):
        fs, _ = _remote(paths[0])
        names = [_remote(path)[1] for path in paths]
        contents = remotely(paths[0], lambda: fs.cat(names, on_error="return"))
        contents = contents if isinstance(contents, dict) else {names[0]: contents}
        for path, name in zip(paths, names, strict=True):
            if isinstance(contents[name], bytes):
                files[path] = contents[name]
        paths = [path for path in paths if isinstance(contents[_remote(path)[1]], Exception)]
    for path in paths:
        try:
            files[path] = read_bytes(path)
        except FileNotFoundError:
            continue
    return files


def read_range(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset`` on, fewer if the file ends before. Raises as ``read_bytes``."""
    if not is_local(path):
        fs, name = _remote(path)
        return remotely(path, lambda: fs.cat_file(name, start=offset, end=offset + size)) if size else b""
    # Not path.open: this is called thousands of times per second.
    descriptor, length = _open(path)
    try:
        # read() would allocate the requested size first, however short the file is.
        size = min(size, max(0, length - offset))
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more
    finally:
        os.close(descriptor)
    return data


def file_size(path: Path) -> int | None:
    """Size of a file in bytes, None if there is no file."""
    if is_local(path):
        return path.stat().st_size if path.is_file() else None
    fs, name = _remote(path)
    try:
        info = remotely(path, lambda: fs.info(name))
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def file_sizes(root: Path) -> dict[str, int]:
    """Size in bytes of every file below ``root``, by its relative POSIX path; {} if there is no such folder."""
    if is_local(root):
        sizes = {}
        for folder, _, names in os.walk(root):
            base = Path(folder).relative_to(root)
            for name in names:
                path = Path(folder, name)
                if path.is_file():
                    sizes[(base / name).as_posix()] = path.stat().st_size
        return sizes
    fs, name = _remote(root)
    try:
        listing = remotely(root, lambda: fs.find(name, detail=True))
    except FileNotFoundError:
        return {}
    prefix = name.rstrip("/") + "/"
    return {path.removeprefix(prefix): int(info["size"]) for path, info in listing.items() if path.startswith(prefix)}


def entry_names(root: Path) -> list[str]:
    """POSIX paths of everything below ``root`` except folders: files, links to anything, FIFOs."""
    if not is_local(root):
        return list(file_sizes(root))
    entries = []
    for folder, folders, names in os.walk(root):
        base = Path(folder)
        links = [name for name in folders if (base / name).is_symlink()]
        entries += [(base / name).relative_to(root).as_posix() for name in (*names, *links)]
    return entries


def folder_names(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted; [] if there is no such folder."""
    if is_local(root):
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    fs, name = _remote(root)
    try:
        listing = remotely(root, lambda: fs.ls(name, detail=True))
    except FileNotFoundError:
        return []
    return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in listing if info["type"] == "directory")


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether both are existing local paths of one file system, so that files of one can be hard links in the other."""
    return is_local(one) and is_local(other) and one.stat().st_dev == other.stat().st_dev


def put_bytes(path: Path, data: bytes) -> None:
    """Write a remote file: whole or not at all, as object stores do."""
    fs, name = _remote(path)
    _make_parent(fs, name)
    remotely(path, lambda: fs.pipe_file(name, data))


def put_file(local: Path, path: Path, moved: Callable[[int], None] | None = None) -> None:
    """Upload a file.

    Args:
        moved: called with numbers of bytes as they are sent, in another thread perhaps; what it raises ends the upload.
    """
    from fsspec.callbacks import DEFAULT_CALLBACK, Callback  # type: ignore[import-untyped]

    fs, name = _remote(path)
    _make_parent(fs, name)
    sent = 0

    class Moved(Callback):  # type: ignore[misc]
        def call(self, hook_name: str | None = None, **named: Any) -> None:
            nonlocal sent
            if moved and self.value > sent:  # less: in another try
                more, sent = self.value - sent, self.value
                moved(more)

    remotely(path, lambda: fs.put_file(str(local), name, callback=Moved() if moved else DEFAULT_CALLBACK))
    if moved and (left := local.stat().st_size - sent) > 0:  # a file system that tells nothing
        moved(left)


def fetch_file(path: Path, local: Path) -> None:
    """Copy a file to a local path; as a hard link if both are on one disk.

    Raises as ``read_bytes``.
    """
    if is_local(path):
        with open_file(path) as file:
            if not path.is_symlink():
                with suppress(OSError):  # another disk, or one without links
                    local.hardlink_to(path)
                    return
            with local.open("wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
        return
    fs, name = _remote(path)
    remotely(path, lambda: fs.get_file(name, str(local)))


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a remote file unless it exists; returns whether it was written.

    Raises:
        StorageError: the file system has no conditional writes.
    """
    fs, name = _remote(path)
    _make_parent(fs, name)
    try:
        remotely(path, lambda: fs.pipe_file(name, data, mode="create"))
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):  # raised by file systems for an unknown mode
        raise no_conditional_writes(path) from None
    return True


def no_conditional_writes(path: Path) -> StorageError:
    return StorageError(
        "this file system has no conditional writes", where=path, fix="do not write to it from several processes"
    )


def remove(paths: Iterable[Path]) -> None:
    """Remove files, remote ones several at a time; missing ones are ignored."""
    remote = []
    for path in paths:
        if is_local(path):
            path.unlink(missing_ok=True)
        else:
            remote.append(path)
    with ThreadPoolExecutor(min(16, max(1, len(remote)))) as pool:
        list(pool.map(_remove_remote, remote))


def _remove_remote(path: Path) -> None:
    fs, name = _remote(path)
    with suppress(FileNotFoundError):
        remotely(path, functools.partial(fs.rm_file, name))


def make_folder(path: Path) -> None:
    """A local folder; object stores have none."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk that holds ``path`` or will hold it; None for remote paths."""
    if not is_local(path):
        return None
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _remote(path: Path) -> tuple[Any, str]:
    remote = cast(Any, path)
    return remote.fs, remote.path


def _make_parent(fs: Any, name: str) -> None:
    # Object stores would try to create the first part as a bucket.
    if fs.protocol == "memory":
        fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
