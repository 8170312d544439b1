"""Untrusted names (of files, classes, runs, keys): how they are shown and distinguished."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

JOINERS = "\u200c\u200d"
"""Invisible, but part of how words are spelt in several scripts, and of emoji."""
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that have an effect instead of a shape: controls; formats, such as those that
reverse the writing direction; surrogates, which stand for bytes that are not UTF-8; line and paragraph separators."""


def visible(text: str, keep: str = "") -> str:
    r"""Text for a terminal or a page: characters with an effect are escaped, as ``\x1b`` or ``\u202e``.

    Args:
        keep: characters to keep: a newline, in multi-line text.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _acts(char) and char not in keep else char for char in text)


def visible_json(value: Any, plain: bool = False) -> str:
    """JSON without characters that have an effect: they are escaped, with ``plain`` also all that is not ASCII."""
    text = json.dumps(value, indent=1, ensure_ascii=plain)
    return "".join(json.dumps(char)[1:-1] if _acts(char) and char != "\n" else char for char in text)


def told_apart(names: Sequence[str], marks: Sequence[object]) -> list[str]:
    """Unique names: repeated ones get their mark, as ``red (2)``. Marks must differ."""
    names = list(names)
    while len(set(names)) < len(names):
        counts = Counter(names)
        names = [f"{name} ({mark})" if counts[name] > 1 else name for name, mark in zip(names, marks, strict=True)]
    return names


def _acts(char: str) -> bool:
    return unicodedata.category(char) in UNSEEN and char not in JOINERS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def why_not_utf8(name: str) -> tuple[str, str]:
    """What is wrong with a name from a disk or the command line that is not UTF-8, and the fix."""
    raw = os.fsencode(name)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return f"a name is not valid UTF-8: {raw!r}", "rename it, e.g. with convmv"
    return (
        f"this locale, whose encoding is {sys.getfilesystemencoding()}, cannot read the name {raw.decode()!a}",
        "set LC_ALL=C.UTF-8 (or PYTHONUTF8=1)",
    )
