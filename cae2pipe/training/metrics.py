"""``metrics.jsonl``: one line a step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import write_bytes


class MetricsFile:
    """Appends lines; opening it at ``step`` first cuts off lines from that step on, and a half-written one."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_lines(path) if line["step"] < step]
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all lines to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none if it does not exist."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
