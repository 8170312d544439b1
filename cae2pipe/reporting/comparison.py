"""The report of a comparison: means and spreads over seeds, the paper's figures beside them, loss curves, cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.box import is_box, open_box
from cae2pipe.config.compare import GridSettings
from cae2pipe.reporting.curves import line_chart
from cae2pipe.reporting.html import Child, Html, element, join, page, table
from cae2pipe.training.metrics import read_lines

BLANK = "–"


@dataclass(frozen=True)
class Row:
    """One variant: top-1 accuracies by evaluation, one a seed; the paper's figures; losses by epoch of the first seed;
    seconds of training a run."""

    name: str
    scores: dict[str, list[float]]
    paper: dict[str, float]
    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """What of a grid is there. ``protocols``: how each evaluation's scores were taken."""

    title: str
    about: str
    kinds: list[str]
    rows: list[Row]
    protocols: dict[str, str]
    seeds: int
    done: int
    wanted: int


def gather_comparison(grid: GridSettings, planned: Sequence[tuple[int, int, str]], out: Path) -> Comparison:
    """All that is finished of a grid below ``out``. ``planned``: variant's place, seed and name of each run."""
    kinds = [scored.kind for scored in grid.evaluate]
    rows = [Row(variant.name, {kind: [] for kind in kinds}, variant.paper, [], []) for variant in grid.variants]
    protocols: dict[str, str] = {}
    for place, _, name in planned:
        run = out / "runs" / name
        if not is_box(run, "run") or not open_box(run).complete:
            continue
        lines = read_lines(run / "metrics.jsonl")
        rows[place].seconds.append(sum(line["images"] / line["images_per_s"] for line in lines if line["images_per_s"]))
        if not rows[place].losses:
            rows[place].losses.extend(mean_by_epoch(lines))
        for kind in kinds:
            folder = out / "scores" / name / kind
            result = open_box(folder).facts.get("result") if is_box(folder, "scores") else None
            if result:
                rows[place].scores[kind].append(result["top1"])
                protocols[kind] = result["protocol"]
    done = sum(len(found) for row in rows for found in row.scores.values())
    return Comparison(
        grid.title, grid.about, list(kinds), rows, protocols, len(grid.seeds), done, len(planned) * len(kinds)
    )


def mean_by_epoch(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Mean loss of each epoch."""
    found: dict[int, list[float]] = {}
    for line in lines:
        found.setdefault(line["epoch"], []).append(line["loss"])
    return [statistics.fmean(found[epoch]) for epoch in sorted(found)]


def spread(values: Sequence[float]) -> str:
    """Percent: the mean, with the standard deviation over seeds where there are several."""
    if not values:
        return BLANK
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def order_of(values: dict[str, float]) -> str:
    """Names from the best to the worst."""
    return " > ".join(sorted(values, key=lambda name: -values[name]))


def findings(found: Comparison) -> list[str]:
    """For each evaluation that the paper has too: whether its order of the variants holds here."""
    lines = []
    for kind in found.kinds:
        here = {row.name: statistics.fmean(row.scores[kind]) for row in found.rows if row.scores[kind]}
        there = {row.name: row.paper[kind] for row in found.rows if kind in row.paper}
        both = [name for name in there if name in here]
        if len(both) < 2:
            continue
        ours, paper = (order_of({name: values[name] for name in both}) for values in (here, there))
        holds = "holds" if ours == paper else f"does not hold: here {ours}"
        lines.append(f"{kind}: the paper's order, {paper}, {holds}.")
    return lines


def cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table."""
    papers = [kind for kind in found.kinds if any(kind in row.paper for row in found.rows)]
    headers = ["variant", *found.kinds, *(f"{kind}, paper" for kind in papers), "loss", "minutes a run"]
    rows = []
    for row in found.rows:
        paper = [f"{row.paper[kind]:.1f}" if kind in row.paper else BLANK for kind in papers]
        loss = f"{row.losses[-1]:.3f}" if row.losses else BLANK
        minutes = f"{statistics.fmean(row.seconds) / 60:.1f}" if row.seconds else BLANK
        rows.append([row.name, *(spread(row.scores[kind]) for kind in found.kinds), *paper, loss, minutes])
    return headers, rows


def state(found: Comparison) -> str:
    """How much of it is there."""
    return f"{found.done} of {found.wanted} scores, {found.seeds} seeds; top-1 accuracy in percent, mean ± deviation."


def comparison_markdown(found: Comparison) -> str:
    """The report in Markdown."""
    headers, rows = cells(found)
    lines = [f"# {found.title}", "", *([found.about.strip(), ""] if found.about else []), state(found), ""]
    lines += ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", *(f"- {line}" for line in findings(found)), ""]
    lines += [f"- {kind}: {protocol}" for kind, protocol in found.protocols.items()]
    return "\n".join(lines).rstrip() + "\n"


def comparison_html(found: Comparison) -> str:
    """The report as one page that refers to nothing outside itself."""
    headers, rows = cells(found)
    children: list[list[Child]] = [list(row) for row in rows]
    parts = [
        element("h1", found.title),
        *([element("p", found.about)] if found.about else []),
        element("p", state(found)),
        table(headers, children),
        *(element("p", line) for line in findings(found)),
        *(element("p", f"{kind}: {protocol}", class_="small") for kind, protocol in found.protocols.items()),
    ]
    curves = [row for row in found.rows if len(row.losses) > 1]
    if curves:
        parts.append(element("h2", "Loss by epoch, first seed"))
    for row in curves:
        chart = line_chart(list(range(1, len(row.losses) + 1)), row.losses, x_label="epoch", y_label="loss")
        parts += [element("h3", row.name), chart]
    return page(found.title, join([Html(part) for part in parts], "\n"))
