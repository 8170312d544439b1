"""A text file as a source: one path or URL per line, optionally with a class after a tab."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.storage import file_size, is_local, read_bytes, to_path
from cae2pipe.errors import SourceError
from cae2pipe.shards.entries import Found, Source, labelled, make_source
from cae2pipe.shards.folder import file_bytes
from cae2pipe.shards.name_lists import text_lines

SUFFIX = ".txt"


def scan_list(path: Path) -> Source:
    """The images that a list names: ``PATH`` or ``PATH<TAB>CLASS``, relative to the list's folder. Empty
    lines are ignored.

    Raises:
        SourceError: a line's file is missing, a path is listed twice, or only some lines have a class.
    """
    try:
        lines = text_lines(read_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(f"this list is not UTF-8: {error}", where=path, fix="save it as UTF-8") from None
    rows = [(number, line.rstrip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise SourceError("this list is empty", where=path, fix="write one path per line")
    pairs = [(number, *line.partition("\t")[::2]) for number, line in rows]
    unlabelled = [number for number, _, name in pairs if not name]
    if unlabelled and len(unlabelled) < len(pairs):
        raise SourceError(
            "some lines have a class, others have none",
            where=f"{path}, line {unlabelled[0]}",
            fix="write PATH<TAB>CLASS on every line, or only PATH",
        )
    labels = labelled(name for _, _, name in pairs if name)
    images, seen = [], dict[str, int]()
    for number, name, label in pairs:
        if name in seen:
            raise SourceError(
                f"this path is also in line {seen[name]}: {name}", where=f"{path}, line {number}", fix="remove one"
            )
        seen[name] = number
        file = to_path(name) if "://" in name else path.parent / name
        images.append(Found(name, labels.get(label, -1), _bytes(file, f"{path}, line {number}"), file))
    return make_source(path, sorted(labels), images)


def _bytes(file: Path, where: str) -> int:
    size = file_bytes(file) if is_local(file) and file.exists() else file_size(file)
    if size is None:
        raise SourceError(f"no such file: {file}", where=where, fix="correct or remove the line")
    return size
