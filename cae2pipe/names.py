"""Names that cannot be written down as UTF-8, and why."""

from __future__ import annotations

import os
import sys


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
