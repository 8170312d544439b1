"""Markdown with escaped text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cae2pipe.runtime.foreign_names import visible

ACTS = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that may be markup anywhere in a line. Underscores within words never are."""
FIRST = re.compile(r"^(\s*\d*)([-+=.)])(?=\s|[-=\s]*$)")
"""Start of a line that makes a list, or a heading of the line above."""
LINK = re.compile(r"(?<=[A-Za-z])(:)(?=//)|(?<=www)(\.)", re.IGNORECASE)
"""Text that GitHub's Markdown turns into a link automatically."""


def escaped(text: str) -> str:
    r"""Text that Markdown renders literally, in one line, also in a table cell; a newline becomes ``\n``."""
    safe = ACTS.sub(r"\\\g<0>", visible(text))
    return FIRST.sub(r"\1\\\2", LINK.sub(r"\\\g<0>", safe))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; cells are text."""
    lines = [[escaped(cell) for cell in line] for line in (headers, *rows)]
    lines.insert(1, ["---"] * len(headers))
    return ["| " + " | ".join(line) + " |" for line in lines]
