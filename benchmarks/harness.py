"""Common code of the benchmark scripts: options, timing in turns, the table and the JSON file.

Compared things are measured in turns within one run (A B A B), so that noise on the machine affects all equally. A
figure is the median over rounds, with the smallest and largest; a ratio is the median of the ratios per round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def parse_options(doc: str, **more: Any) -> argparse.Namespace:
    """The options that every script takes; ``more`` adds further ones with argparse's arguments."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and samples: a minute or two on two cores")
    parser.add_argument("--device", default="cpu", help="where the model under test runs")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    for name, arguments in more.items():
        parser.add_argument(f"--{name}", **arguments)
    return parser.parse_args()


def rate(work: Callable[[], Any], count: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Things per second of ``clock``, if one call of ``work`` does ``count``."""
    began = clock()
    work()
    return count / (clock() - began)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The values of each measure in ``rounds`` rounds, after an uncounted warm-up round."""
    values_of: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if turn:
                values_of[name].append(value)
    return values_of


def figures(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Median and spread, for a row."""
    return {
        "median": round(statistics.median(values), digits),
        "spread": [round(min(values), digits), round(max(values), digits)],
    }


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def at_least(name: str, value: float, goal: float, digits: int = 3) -> dict[str, Any]:
    """A check that passes if the value, before rounding, is at least ``goal``."""
    return {"name": name, "value": round(value, digits), "goal": f">= {goal:g}", "ok": bool(value >= goal)}


def at_most(name: str, value: float, goal: float, digits: int = 3) -> dict[str, Any]:
    """A check that passes if the value is at most ``goal``."""
    return {"name": name, "value": round(value, digits), "goal": f"<= {goal:g}", "ok": bool(value <= goal)}


def real_folder() -> Path | None:
    """The folder of real images and weights that CAE2PIPE_REAL names; None, with a warning, without one."""
    folder = os.environ.get("CAE2PIPE_REAL")
    if folder and Path(folder).is_dir():
        return Path(folder)
    warnings.warn("CAE2PIPE_REAL is not a folder: using synthetic images and random weights", stacklevel=2)
    return None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"


def finish(
    options: argparse.Namespace,
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    libraries: Sequence[str],
) -> None:
    """Print rows and checks as tables and, with ``--out``, write the result. A missed goal is not an error."""
    print_table(benchmark, rows)
    print_table("checks", checks)
    if options.out:
        write_result(options, benchmark, rows, checks, settings, libraries)


def write_result(
    options: argparse.Namespace,
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    libraries: Sequence[str],
) -> None:
    """Write the result to the file of ``--out``."""
    result = {
        "benchmark": benchmark,
        "device": device_name(options.device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in libraries},
        "settings": {"quick": options.quick, "threads": torch.get_num_threads(), **settings},
        "rows": list(rows),
        "checks": list(checks),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    # Without a terminal, rich would truncate cells to a default width.
    Console(width=None if os.isatty(1) else 160).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict) and value.keys() == {"median", "spread"}:
        low, high = value["spread"]
        return f"{value['median']:,} ({low:,} .. {high:,})"
    return str(value)
