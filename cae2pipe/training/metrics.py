"""``metrics.jsonl``, one line per step, and ``probe.jsonl``, one line per probe."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.wording import counted

METRICS_FILE, PROBE_FILE = "metrics.jsonl", "probe.jsonl"
PLACE = ("step", "epoch")
NUMBERS = (*PLACE, "loss")
"""Numbers in every line of metrics."""


class MetricsFile:
    """Appends lines. Opening at ``step`` first removes the lines from that step on, and a partial last line.

    If others are damaged or missing, the readable lines are kept, the original file is renamed to a name that ends in
    ``.damaged``, and the log says which steps have no line.

    Args:
        every_step: whether every step has a line, with all of ``NUMBERS``; otherwise any steps, with ``PLACE``.
    """

    def __init__(self, path: Path, step: int, report: Report, *, every_step: bool = True):
        lines, damaged = valid_lines(path, NUMBERS if every_step else PLACE)
        kept = {line["step"]: line for line in lines if line["step"] < step}
        missing = [number for number in range(step) if number not in kept] if every_step else []
        self.steps = frozenset(kept)
        if damaged or missing:
            report.log(rescue(path, damaged, missing))
        text = "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept))
        write_bytes(path, text.encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Write all lines through to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(path: Path, needed: Iterable[str] = ()) -> tuple[list[dict[str, Any]], int]:
    """The valid lines of a metrics file, and the number of invalid ones, except a partial last line.

    A valid line is a JSON object with finite numbers for ``NUMBERS`` and for all names in ``needed``. A file that does
    not exist has no lines.
    """
    return valid_lines(path, (*NUMBERS, *needed))


def read_probes(path: Path) -> list[dict[str, Any]]:
    """The valid lines of a file of probes, by step."""
    return sorted(valid_lines(path, PLACE)[0], key=lambda line: line["step"])


def valid_lines(path: Path, needed: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects with finite numbers for all names in ``needed``, which include ``PLACE``; and the
    number of other lines, except a partial last one."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return [], 0
    texts = data.splitlines()
    lines = [parsed(text, needed) for text in texts]
    if lines and lines[-1] is None:
        lines.pop()
    good = [line for line in lines if line is not None]
    return good, len(lines) - len(good)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The valid lines of a metrics file."""
    return read_metrics(path)[0]


def parsed(text: bytes, needed: Iterable[str]) -> dict[str, Any] | None:
    """A line of a metrics file; None if it is damaged."""
    try:
        line = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    if not isinstance(line, dict) or not all(is_number(line.get(name)) for name in needed):
        return None
    return line if all(type(line[name]) is int and line[name] >= 0 for name in PLACE) else None


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def rescue(path: Path, damaged: int, missing: list[int]) -> str:
    """Keep a damaged file under another name. Returns a message about it."""
    parts = [counted(damaged, "damaged line")] if damaged else []
    if missing:
        parts.append(f"no line for {counted(len(missing), 'step')} ({shown_ranges(missing)})")
    said = f"{path}: {', '.join(parts)}"
    copy = next(
        free for number in count() if not (free := path.with_name(f"{path.name}.damaged{number or ''}")).exists()
    )
    first = copy.name.endswith(".damaged")
    # Missing lines are found again whenever the run resumes: one copy is enough for them.
    if path.exists() and (damaged or first):
        write_bytes(copy, read_bytes(path))
        said += f"; the original file is now {copy.name}"
    return said


def shown_ranges(numbers: list[int], most: int = 5) -> str:
    """Sorted numbers as ranges, at most ``most`` of them: ``0 to 3, 7, 9 to 12``."""
    starts = [n for index, n in enumerate(numbers) if index == 0 or numbers[index - 1] != n - 1]
    ends = [n for index, n in enumerate(numbers) if index + 1 == len(numbers) or numbers[index + 1] != n + 1]
    ranges = [str(low) if low == high else f"{low} to {high}" for low, high in zip(starts, ends, strict=True)]
    return ", ".join(ranges[:most]) + (", ..." if len(ranges) > most else "")
