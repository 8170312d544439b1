"""A target set that tests may change, and images that `evaluate` can score an encoder on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = {"bright": (230, 220, 40), "dark": (20, 30, 60), "red": (200, 20, 30)}


@pytest.fixture
def copy(target_root, tmp_path) -> Path:
    """A copy of the target set that the test may change."""
    root = tmp_path / "copy"
    shutil.copytree(target_root, root)
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three colours with noise: even an untrained encoder distinguishes them. One val file is not an image."""
    rng = np.random.default_rng(0)
    for part, each in (("train", 6), ("val", 3)):
        for name, colour in CLASSES.items():
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.clip(np.array(colour) + rng.integers(-15, 16, size=(40, 44, 3)), 0, 255)
                path = tmp_path / "data" / part / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "data" / "val" / "red" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "data"
