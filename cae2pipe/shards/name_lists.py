"""Lists of names in text files: a name a line."""

from __future__ import annotations

from cae2pipe.errors import SourceError


def text_lines(text: str) -> list[str]:
    r"""The lines of a file, without their ends and without empty ones at the file's end.

    Only ``\n`` and ``\r\n`` end a line: a name may hold what else ``str.splitlines`` takes for an end.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def listed_names(text: str, where: object) -> list[str]:
    """The names of labels, in their order, a line each.

    Raises:
        SourceError: a line among them is empty, so that one cannot tell which label the next name is of.
    """
    names = [line.strip() for line in text_lines(text)]
    if "" in names:
        raise SourceError(
            "this line is empty, and others follow",
            where=f"{where}, line {names.index('') + 1}",
            fix="remove it, or name the label: one line a label, in their order",
        )
    return names
