"""What the tables of benchmarks/tables.py are put together from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIGNS = {">=": "≥", "<=": "≤"}


def read(results: Path, name: str) -> dict[str, Any]:
    """A benchmark's result on a CPU."""
    result: dict[str, Any] = json.loads((results / f"{name}-cpu.json").read_text())
    return result


def check(result: dict[str, Any], part: str) -> dict[str, Any]:
    """The check whose name contains ``part``."""
    row: dict[str, Any] = next(row for row in result["checks"] if part in row["name"])
    return row


def goal(row: dict[str, Any], why: str) -> str:
    """A check's goal, and whether it was missed."""
    sign, number = row["goal"].split()
    return f"{SIGNS[sign]} {float(number):,g}" + ("" if row["ok"] else f", missed{why}")


def significant(value: float, digits: int, most: int = 3) -> str:
    """``digits`` significant digits, but at most ``most`` decimals; with thousands separators, without exponents."""
    if not value:
        return "0"
    places = min(most, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{round(value, places):,.{max(0, places)}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|" for line in lines)
