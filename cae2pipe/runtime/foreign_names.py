"""Names that others chose (of files, classes, runs, keys) are data: how they are shown, and told apart."""

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
"""Unicode's categories of what acts instead of being seen: controls; formats, such as those that reverse the direction
of writing; surrogates, which stand for bytes that are not UTF-8; separators of lines and of paragraphs."""


def visible(text: str, keep: str = "") -> str:
    r"""Text for a terminal or a page: what would act instead of being seen is escaped, as ``\x1b`` or ``\u202e``.

    Args:
        keep: characters that may act nevertheless: a newline, in text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _acts(char) and char not in keep else char for char in text)


def visible_json(value: Any, plain: bool = False) -> str:
    """JSON in which nothing acts: that is escaped, and all that is not ASCII where ``plain``."""
    text = json.dumps(value, indent=1, ensure_ascii=plain)
    return "".join(json.dumps(char)[1:-1] if _acts(char) and char != "\n" else char for char in text)


def told_apart(names: Sequence[str], marks: Sequence[object]) -> list[str]:
    """Names of which none repeats: those that do bear their mark, as ``red (2)``. Marks must differ."""
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
    """What is wrong with a name of a disk or of the command line that is not UTF-8 as Python has it, and the remedy."""
    raw = os.fsencode(name)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return f"a name is not valid UTF-8: {raw!r}", "rename it, e.g. with convmv"
    return (
        f"this locale, whose encoding is {sys.getfilesystemencoding()}, cannot read the name {raw.decode()!a}",
        "set LC_ALL=C.UTF-8 (or PYTHONUTF8=1)",
    )
