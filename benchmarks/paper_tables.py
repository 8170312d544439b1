"""Tables of the paper's orders: scores of its variants at the small scale, and which orders hold there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paired import difference, unpacked, verdict
from benchmarks.table_parts import table
from cae2pipe.config.base import load
from cae2pipe.config.compare import GridSettings

SCORES = {"knn": "kNN", "linear": "linear"}
Rows = dict[tuple[str, str], list[dict[str, Any]]]


def paper_orders(results: Path) -> str:
    """Scores of all variants, then the order of every two that follow each other in the paper."""
    path = results / "paper_orders-cpu.json"
    if not path.exists():
        return "Nothing has been measured."
    content = json.loads(path.read_text())
    groups: Rows = {}
    for row in content["rows"]:
        groups.setdefault((row["grid"], row["variant"]), []).append(row)
    papers = {grid: published(grid) for grid in dict.fromkeys(grid for grid, _ in groups)}
    scores = [
        (titled(grid), variant, *(spread(groups[grid, variant], name) for name in SCORES), f"{linear:.1f}")
        for grid, paper in papers.items()
        for variant, linear in paper.items()
        if (grid, variant) in groups
    ]
    heads = ("", "variant", *SCORES.values(), "paper, linear")
    orders = table(
        ("", "the paper has", *SCORES.values(), "paper, linear", "in kNN", "linear"),
        [line for grid, paper in papers.items() for line in orders_of(grid, paper, groups)],
    )
    return f"{table(heads, scores)}\n\n{orders}"


def published(grid: str) -> dict[str, float]:
    """The paper's linear probes of a grid's variants."""
    settings = load(GridSettings, "compare", grid, overrides=())
    return {variant.name: variant.paper["linear"] for variant in settings.variants}


def orders_of(grid: str, paper: Mapping[str, float], groups: Rows) -> Iterator[tuple[str, ...]]:
    """A line for every two variants that follow each other in the paper, over the seeds that both have."""
    for low, high in pairwise(sorted((name for name in paper if (grid, name) in groups), key=paper.__getitem__)):
        sides = [{row["seed"]: row for row in groups[grid, name]} for name in (low, high)]
        seeds = sorted(sides[0].keys() & sides[1].keys())
        told, verdicts = [], []
        for score in SCORES:
            first, second = (right([side[seed] for seed in seeds], score) for side in sides)
            points, margin = difference(first, second)
            told.append(f"{points:+.1f}" + ("" if math.isnan(margin) else f" ± {margin:.1f}"))
            verdicts.append(verdict(points, margin, paper[high] - paper[low]))
        yield titled(grid), f"{high} over {low}", *told, f"{paper[high] - paper[low]:+.1f}", *verdicts


def right(rows: Sequence[Mapping[str, Any]], score: str) -> NDArray[np.bool_]:
    """Which images are classified correctly, by seed: bool (S, N)."""
    return np.stack([unpacked(row["right"][score]) for row in rows])


def titled(grid: str) -> str:
    """``Table 1`` of ``table1``."""
    return f"{grid[:-1].capitalize()} {grid[-1]}"


def spread(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    """Mean ± standard deviation over the seeds."""
    values = [row[score] for row in rows]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
