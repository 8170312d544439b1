"""Reading JSON: one reader for every document in a folder of cae2pipe.

Whatever the bytes are, the result is a value that Python can traverse, print and write again, or one error that names
the file: no nesting that exhausts the stack, no NaN or infinity, no integer beyond 64 bits, no lone surrogate.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cae2pipe.artifacts.storage import file_size, read_bytes
from cae2pipe.errors import Cae2pipeError, ManifestError

LIMIT = 256 * 2**20
"""Largest document that is read by default, in bytes."""


def parse_json(data: bytes | str, where: object, *, fix: str, error: type[Cae2pipeError] = ManifestError) -> Any:
    """The value of a JSON document.

    Args:
        where: the file, or its line, for errors.
        fix: how to repair the file. error: the class to raise.

    Raises:
        ``error``: not UTF-8, not JSON, nested more than 200 deep, or a number that is not finite or has over 64 bits.
    """
    try:
        value = from_json(data, allow_inf_nan=False)
        check_numbers(value)
    except ValueError as problem:
        raise error(f"not valid JSON ({problem})", where=where, fix=fix) from None
    return value


def read_json(path: Path, *, fix: str, error: type[Cae2pipeError] = ManifestError, limit: int = LIMIT) -> Any:
    """The value of a JSON file.

    Raises:
        ``error``: as ``parse_json``, or the file has more than ``limit`` bytes. OSError: it cannot be read, or is not
            a regular file; FileNotFoundError if it does not exist.
    """
    return parse_json(read_document(path, fix=fix, error=error, limit=limit), path, fix=fix, error=error)


def read_document(path: Path, *, fix: str, error: type[Cae2pipeError] = ManifestError, limit: int = LIMIT) -> bytes:
    """A whole file of at most ``limit`` bytes. Raises as ``read_json``."""
    size = file_size(path)
    if size is not None and size > limit:
        raise error(f"the file is too large: {size} bytes, at most {limit} are read", where=path, fix=fix)
    return read_bytes(path)


def check_numbers(value: object) -> None:
    """Raise ValueError if a JSON value holds a non-finite float or an integer of more than 64 bits."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError("a number is not finite")
        elif isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise ValueError("an integer has more than 64 bits")
