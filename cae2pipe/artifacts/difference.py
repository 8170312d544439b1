"""How two JSON values differ, for messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """A field in which two nested dictionaries differ: its dotted name and both values, None where it is missing."""

    name: str
    old: object
    new: object


Fix = str | Callable[[Sequence[Difference]], str]
"""What to do about differences, which may depend on them."""


def differences(old: object, new: object, name: str = "") -> Iterator[Difference]:
    """All fields in which two nested dictionaries differ, sorted by name."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif _plain(old) != _plain(new):
        yield Difference(name, old, new)


def first_difference(old: object, new: object) -> Difference | None:
    """The first field, in sorted order, in which two nested dictionaries differ."""
    return next(differences(old, new), None)


def abridged(value: object) -> str:
    """A value as JSON, truncated if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: object) -> object:
    plain: object = json.loads(json.dumps(value))
    return plain
