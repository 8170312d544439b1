"""How two JSON values differ, for messages."""

from __future__ import annotations

import json


def first_difference(old: object, new: object, name: str = "") -> tuple[str, object, object] | None:
    """The first field, in sorted order, in which two nested dictionaries differ: (dotted name, old, new) or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if _plain(old) == _plain(new) else (name, old, new)


def abridged(value: object) -> str:
    """A value as JSON, truncated if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: object) -> object:
    plain: object = json.loads(json.dumps(value))
    return plain
