"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real images and weights named by CAE2PIPE_REAL; tests that need it skip without it."""
    folder = os.environ.get("CAE2PIPE_REAL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CAE2PIPE_REAL names no folder of real data")
    return Path(folder)
