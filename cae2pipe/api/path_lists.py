"""Paths as arguments of functions: one or several, local or optional ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from cae2pipe.artifacts.storage import to_local_path, to_path
from cae2pipe.errors import SettingsError
from cae2pipe.targets.target_set import TargetSet

OnePath = str | os.PathLike[str]
Paths = OnePath | Iterable[OnePath]


def local_paths(given: Paths) -> list[Path]:
    """The local paths, also if a single one is given without a list around it.

    Raises:
        BadInputError: one of them is a URL, or no path.
    """
    several = [given] if isinstance(given, str | os.PathLike) else given
    return [to_local_path(path) for path in several]


def target_roots(given: OnePath | Sequence[OnePath]) -> list[Path]:
    """The paths or URLs of one or several target sets.

    Raises:
        SettingsError: there are none. Otherwise as ``to_path``.
    """
    # Not every path of fsspec is an os.PathLike.
    several = given if isinstance(given, list | tuple) else [cast(OnePath, given)]
    if not several:
        raise SettingsError("no target set is given", where="targets", fix="give at least one")
    return [to_path(root) for root in several]


def known_pixels(targets: OnePath | Sequence[OnePath] | None, given: OnePath | None = None) -> Path | None:
    """The folder or URL with the pixels of sets by reference: as given, or that of an open one among ``targets``."""
    if given is not None:
        return to_path(given)
    several = targets if isinstance(targets, list | tuple) else [targets]
    opened = [each for each in several if isinstance(each, TargetSet) and each.artifact.by_reference]
    return next((each.pixels_folder for each in opened if each.pixels_folder), None)


def optional_path(given: OnePath | None) -> Path | None:
    """A path or URL, if there is one. Raises as ``to_path``."""
    return None if given is None else to_path(given)


def optional_local(given: OnePath | None) -> Path | None:
    """A local path, if there is one. Raises as ``to_local_path``."""
    return None if given is None else to_local_path(given)


def encoder_name(given: OnePath) -> str:
    """The name of an encoder, which may be a local path or its URL. Raises as ``to_local_path``."""
    name = given if isinstance(given, str) else str(to_local_path(given))
    return str(to_local_path(name)) if "://" in name else name
