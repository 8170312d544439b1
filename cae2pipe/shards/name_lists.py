"""Lists of names in text files: one name per line."""

from __future__ import annotations

from cae2pipe.errors import SourceError


def text_lines(text: str) -> list[str]:
    r"""The lines of a file, without line ends and trailing empty lines.

    Only ``\n`` and ``\r\n`` end a line: a name may contain other line ends of ``str.splitlines``.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def listed_names(text: str, where: object) -> list[str]:
    """The names of labels in order, one per line.

    Raises:
        SourceError: a line in between is empty, so that the labels of the next names are unclear.
    """
    names = [line.strip() for line in text_lines(text)]
    if "" in names:
        raise SourceError(
            "this line is empty, but others follow",
            where=f"{where}, line {names.index('') + 1}",
            fix="remove it, or name the label: one line per label, in order",
        )
    return names
