"""Many pretrainings side by side on one target set: train what is not trained yet, score it, write one report.

Every run is one that `pretrain` makes and every score one that `evaluate` makes, in folders of their own: both go on
where they were, and do nothing where they are finished. So does this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.parts import Part
from cae2pipe.config.base import load, merge
from cae2pipe.config.compare import GridSettings, slug
from cae2pipe.config.evaluate import EVALUATIONS
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.progress import Report
from cae2pipe.reporting.comparison import Comparison, comparison_html, comparison_markdown, gather_comparison
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.pretrain import pretrain

MARKDOWN, HTML = "report.md", "report.html"


@dataclass(frozen=True)
class Planned:
    """One run of a grid: its variant's place, its seed, its folder's name and its settings."""

    variant: int
    seed: int
    name: str
    settings: PretrainSettings


def expand(grid: GridSettings, small: bool, speed: dict[str, Any]) -> list[Planned]:
    """All runs of a grid, seed by seed, so that a grid that is broken off has whole comparisons.

    Raises:
        SettingsError: a variant's settings do not fit; all are looked at before anything is trained.
    """
    common = merge(grid.set, grid.small) if small else grid.set
    planned = []
    for seed in grid.seeds:
        for place, variant in enumerate(grid.variants):
            values = merge(merge(merge(common, variant.set), {"seed": seed}), {"speed": speed} if speed else {})
            settings = load(PretrainSettings, "pretrain", grid.config, (), values)
            planned.append(Planned(place, seed, f"{slug(variant.name)}-s{seed}", settings))
    return planned


def compare(
    grid: GridSettings,
    targets: Path,
    data: Path,
    out: Path,
    report: Report,
    *,
    small: bool = False,
    part: Part | None = None,
    speed: dict[str, Any] | None = None,
) -> Comparison:
    """Train and score every run of a grid, or a part of them, and write the report of what is there.

    Args:
        targets: the target set. data: labelled images, as evaluations take them. small: take the grid's small scale.
        part: which of the runs. speed: ``device`` and ``workers`` for all.

    Raises:
        As ``pretrain`` and ``evaluate``.
    """
    speed = speed or {}
    planned = expand(grid, small, speed)
    own = [run for place, run in enumerate(planned) if part is None or part.owns(place)]
    for number, run in enumerate(own, 1):
        report.log(f"run {number} of {len(own)}: {grid.variants[run.variant].name}, seed {run.seed}")
        folder = out / "runs" / run.name
        pretrain(targets, folder, run.settings, report)
        for scored in grid.evaluate:
            values = merge(scored.set, {"speed": speed} if speed else {})
            settings = load(EVALUATIONS[scored.kind], "evaluate", scored.config or scored.kind, (), values)
            evaluate(scored.kind, str(folder), data, out / "scores" / run.name, settings, report)
    return write_report(grid, planned, out, report)


def write_report(grid: GridSettings, planned: list[Planned], out: Path, report: Report) -> Comparison:
    """The report of all that is finished."""
    found = gather_comparison(grid, [(run.variant, run.seed, run.name) for run in planned], out)
    write_bytes(out / MARKDOWN, comparison_markdown(found).encode())
    write_bytes(out / HTML, comparison_html(found).encode())
    report.log(f"wrote {out / HTML}: {found.done} of {found.wanted} scores")
    return found
