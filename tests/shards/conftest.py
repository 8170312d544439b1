"""Sources of shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_photos
from tests.shards.archives import tree
from tests.shards.small_source import encoded


@pytest.fixture
def photo_files(tmp_path) -> dict[str, bytes]:
    """12 images in 3 classes, by ``class/name``."""
    return tree(write_photos(tmp_path / "photos", classes=3, each=4))


@pytest.fixture
def source(tmp_path) -> Path:
    """27 files in three classes: 24 images of many kinds, and three that are not images."""
    files = {f"{name}/{n:02d}.jpg": encoded("JPEG", n) for n, name in enumerate(["cat", "dog", "elk"] * 6)}
    files |= {
        "cat/png inside.JPEG": encoded("PNG", 20),
        "cat/cmyk.jpg": encoded("JPEG", 21, "CMYK"),
        "dog/grey.jpeg": encoded("JPEG", 22, "L"),
        "dog/v1.2 ünïcode.jpg": encoded("JPEG", 23),
        "elk/deep/palette.gif": encoded("GIF", 24),
        "elk/alpha.png": encoded("PNG", 25, "RGBA"),
        "cat/cut.jpg": encoded("JPEG", 26)[:-60],
        "dog/text.jpg": b"this is text",
        "elk/empty.png": b"",
    }
    for path, data in files.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    return tmp_path / "source"
