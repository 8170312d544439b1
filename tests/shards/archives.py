"""Typical archives of users, made of a few photographs, and common assertions."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.source import scan
from tests.conftest import contents

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
    """One tar per class of ``class/name`` files, as in ImageNet."""
    return {
        f"{label}.tar": tar_bytes(
            {name.split("/")[1]: data for name, data in files.items() if name.split("/")[0] == label}
        )
        for label in sorted({name.split("/")[0] for name in files})
    }


def packed(source: Path, out: Path) -> dict[str, bytes]:
    return contents(build_shard_set(source, out, ALONE, report=Silent()).root)


def refused(source: Path, **options) -> SourceError:
    with pytest.raises(SourceError) as caught:
        scan(source, **options)
    assert caught.value.where
    assert caught.value.fix
    return caught.value
