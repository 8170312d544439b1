"""One path or several, as arguments of functions."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cae2pipe.artifacts.storage import to_path

OnePath = str | os.PathLike[str]
Paths = OnePath | Iterable[OnePath]


def paths(given: Paths) -> list[Path]:
    """The paths, also if a single one is given without a list around it."""
    several = [given] if isinstance(given, str | os.PathLike) else given
    return [to_path(path) for path in several]
