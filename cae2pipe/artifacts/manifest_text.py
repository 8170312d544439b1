"""The text of a manifest: indented JSON with sorted keys, of which units can be taken out and put in one by one.

In this layout every unit begins on a line of its own, indented by two. JSON has no line breaks within its values, so a
text that is cut at such lines is the same document exactly if what remains, and every piece, is valid JSON by itself.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping

from pydantic_core import from_json

from cae2pipe.artifacts.manifest_values import Unit
from cae2pipe.artifacts.units import Units

FIRST = b'\n "units": {\n  "'
NEXT = b'\n  },\n  "'
LAST = b"\n  }\n }"


def text(value: Mapping[str, object]) -> bytes:
    """The bytes of a manifest or a journal entry."""
    units = value.get("units")
    if not isinstance(units, Units):
        return _indented(value) + b"\n"
    mark = _mark()
    before, after = _indented({**value, "units": mark}).split(b'"%s"' % mark.encode())
    return b"".join([before, *_lines(units), after, b"\n"])


def split(data: bytes) -> tuple[bytes, dict[str, memoryview]] | None:
    """A manifest with its units left out, and the text of each unit by its name, none of which has been validated.

    None: the manifest is not in the layout of ``text``, or a name occurs twice.
    """
    start = data.find(FIRST)
    stop = data.find(LAST, start)
    if start < 0 or stop < 0:
        return None
    start, stop = start + len(FIRST) - len(b'{\n  "'), stop + len(LAST)
    # A mark that no file can contain shows that these are the units, and not a field of the same name elsewhere.
    mark = _mark()
    try:
        outer = from_json(b'%b"%b"%b' % (data[:start], mark.encode(), data[stop:]), allow_inf_nan=False)
    except ValueError:
        return None
    if not isinstance(outer, dict) or outer.get("units") != mark:
        return None
    view, units = memoryview(data), {}
    position, end = start + len(b"{\n  "), stop - len(b"\n }")
    while position < end:
        colon = data.find(b'": ', position, end)
        until = data.find(NEXT, colon, end) + len(b"\n  }")
        if until < len(b"\n  }"):
            until = end
        name = data[position + 1 : colon].decode("utf-8", "replace")
        if colon < 0 or name in units:
            return None
        units[name] = view[colon + len(b'": ') : until]
        position = until + len(b",\n  ")
    return b"%b{}%b" % (data[:start], data[stop:]), units


def _lines(units: Units[Unit]) -> list[bytes | memoryview]:
    if not units:
        return [b"{}"]
    parts: list[bytes | memoryview] = []
    for name in sorted(units):
        kept = units.kept(name)
        own = kept if isinstance(kept, memoryview | bytes) else _indented(kept).replace(b"\n", b"\n  ")
        parts += [b'{\n  "' if not parts else b',\n  "', name.encode(), b'": ', own]
    return [*parts, b"\n }"]


def _indented(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")


def _mark() -> str:
    return secrets.token_hex(16)
