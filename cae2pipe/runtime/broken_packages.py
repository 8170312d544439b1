"""Packages that are installed but cannot be imported, such as builds that do not belong together."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from types import TracebackType

from cae2pipe.errors import BadInputError, Cae2pipeError

WITHOUT_OPERATORS = re.compile(r"torchvision::|Couldn't load custom C\+\+ ops|'torchvision' object has no attribute")
"""What torch and torchvision say if torchvision's library could not be loaded: it was built for another torch."""


def explain_import(error: BaseException) -> Cae2pipeError | None:
    """The error to show if another project's package failed while it was imported; None for any other error.

    Such a failure may be an ImportError, but also an OSError (a library is missing), a RuntimeError, an AttributeError.
    """
    said = next(iter(str(error).splitlines()), "")
    package = imported_package(error.__traceback__)
    if package == "torchvision" or (
        isinstance(error, (RuntimeError, AttributeError)) and WITHOUT_OPERATORS.search(said)
    ):
        torch = _version("torch")
        return BadInputError(
            f"torch {torch} and torchvision {_version('torchvision')} do not belong together: {said}",
            fix=f"install the torchvision that belongs to torch {torch}, both from one index: pip install "
            f"--force-reinstall torch=={torch.partition('+')[0]} torchvision, with the --index-url that "
            "https://pytorch.org/get-started/locally/ gives for this machine",
        )
    if package is not None:
        return BadInputError(
            f"{package} {_version(package)} cannot be imported: {type(error).__name__}: {said}",
            fix=f"reinstall it with what it depends on: pip install --force-reinstall {_distribution(package)}",
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        if missing not in ("cae2pipe", *sys.stdlib_module_names):
            return BadInputError(f"{missing} is not installed", fix="install what cae2pipe needs: pip install cae2pipe")
    return None


def imported_package(traceback: TracebackType | None) -> str | None:
    """The installed package whose own modules were being imported, last of all, when an error was raised."""
    found = None
    for name, function in _calls(traceback):
        if name == "cae2pipe":
            found = None
        elif function == "<module>" and name not in sys.stdlib_module_names:
            found = name
    return found if found in _distributions() else None


def _calls(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    """Package and function of each call, from the one that caught the error to the one that raised it."""
    while traceback is not None:
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__")).partition(".")[0], frame.f_code.co_name
        traceback = traceback.tb_next


def _distribution(package: str) -> str:
    """What pip calls a package: ``PIL`` comes with ``pillow``."""
    return next(iter(_distributions().get(package, [])), package)


_distributions = functools.cache(metadata.packages_distributions)


def _version(package: str) -> str:
    """With the build, as in ``2.14.0+cpu``, if the package has got as far as saying it."""
    said = getattr(sys.modules.get(package), "__version__", None)
    try:
        return str(said or metadata.version(_distribution(package)))
    except metadata.PackageNotFoundError:
        return "(not installed)"
