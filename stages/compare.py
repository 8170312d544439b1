"""Many pretrainings side by side on one target set: train what is not trained yet, score it, write one report.

Every run is one that `pretrain` makes and every score one that `evaluate` makes, in folders of their own: both go on
where they were, and do nothing where they are finished. So does this. A run's folder is named after what it was made
from, so that grids in one folder share the runs that they have in common:

OUT/runs/caev2-s0-1a2b3c4d/       a run: method, seed, fingerprint of settings and targets
OUT/scores/caev2-s0-1a2b3c4d/     its scores
OUT/targets/klt-0.99/             the target set recoded, where a grid compares codecs
OUT/reports/table2/report.html    what came out of one grid
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.box import MANIFEST, open_box
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.lock import holding
from cae2pipe.artifacts.parts import Part, torchrun_rank
from cae2pipe.config.base import identity, load, merge
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import EVALUATIONS
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.progress import Report, Silent
from cae2pipe.reporting.comparison import Comparison, gather_grid
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.report import write_report
from cae2pipe.training.device import pick_device
from cae2pipe.training.parallel import joined


@dataclass(frozen=True)
class Planned:
    """One run of a grid: its variant's place, its seed, its folder's name, its settings, and the codec that the target
    set is recoded with for it, if it is."""

    variant: int
    seed: int
    name: str
    settings: PretrainSettings
    codec: CodecSettings | None


def expand(grid: GridSettings, targets: str, small: bool, speed: dict[str, Any]) -> list[Planned]:
    """All runs of a grid, seed by seed, so that a grid that is broken off has whole comparisons.

    Args:
        targets: the target set's fingerprint. speed: ``device`` and ``workers`` for all.

    Raises:
        SettingsError: a variant's settings do not fit; all are looked at before anything is trained.
    """
    common = merge(grid.set, grid.small) if small else grid.set
    planned = []
    for seed in grid.seeds:
        for place, variant in enumerate(grid.variants):
            own = merge(variant.set, variant.small) if small else variant.set
            values = merge(merge(merge(common, own), {"seed": seed}), {"speed": speed} if speed else {})
            settings = load(PretrainSettings, "pretrain", grid.config, (), values)
            made_from = [identity(settings), targets, variant.codec and identity(variant.codec)]
            name = f"{settings.method}-s{seed}-{fingerprint(made_from)[:8]}"
            planned.append(Planned(place, seed, name, settings, variant.codec))
    return planned


def compare(
    grid: GridSettings,
    name: str,
    targets: Path,
    data: Path,
    out: Path,
    report: Report,
    *,
    small: bool = False,
    part: Part | None = None,
    speed: dict[str, Any] | None = None,
) -> Comparison | None:
    """Train and score every run of a grid, or a part of them, and write the report of what is there.

    Under torchrun its processes share every run; all but the leading one get None.

    Args:
        name: the grid's, which its report's folder bears. targets: the target set. data: labelled images, as
            evaluations take them. small: take the grid's small scale. part: which of the runs.
        speed: ``device`` and ``workers`` for all.

    Raises:
        As ``recode``, ``pretrain`` and ``evaluate``.
    """
    speed, rank = speed or {}, torchrun_rank()
    device = pick_device(speed.get("device", "auto"), rank.local)
    # The leading process makes pages while the others wait.
    with joined(rank, device, "ddp", rank.ranks, timedelta(hours=2)) as world:
        told = report if world.leads else Silent()
        planned = run_part(grid, targets, data, out, told, small=small, part=part, speed=speed)
        return write_grid(grid, name, planned, targets, out, report, device) if world.leads else None


def write_grid(
    grid: GridSettings,
    name: str,
    planned: list[Planned],
    targets: Path,
    out: Path,
    report: Report,
    device: torch.device,
) -> Comparison:
    """The report of what is there of a grid."""
    sets = [targets, *(path.parent for path in sorted((out / "targets").glob(f"*/{MANIFEST}")))]
    found = gather_grid(grid, [(run.variant, run.name) for run in planned], out, sets)
    write_report(found, targets, out / "reports" / name, report, device)
    return found


def run_part(
    grid: GridSettings,
    targets: Path,
    data: Path,
    out: Path,
    report: Report,
    *,
    small: bool,
    part: Part | None,
    speed: dict[str, Any],
) -> list[Planned]:
    """Train and score a part of a grid's runs. Gives all that are planned."""
    planned = expand(grid, open_box(targets, "targets").fingerprint, small, speed)
    # Variants that come to the same are one run.
    distinct = list({run.name: run for run in planned}.values())
    own = [run for place, run in enumerate(distinct) if part is None or part.owns(place)]
    for number, run in enumerate(own, 1):
        report.log(f"run {number} of {len(own)}: {grid.variants[run.variant].name}, seed {run.seed} ({run.name})")
        folder = out / "runs" / run.name
        pretrain(recoded(targets, run.codec, out, report), folder, run.settings, report)
        for scored in grid.evaluate:
            values = merge(scored.set, {"speed": speed} if speed else {})
            settings = load(EVALUATIONS[scored.kind], "evaluate", scored.config or scored.kind, (), values)
            evaluate(scored.kind, str(folder), data, out / "scores" / run.name, settings, report)
    return planned


def recoded(targets: Path, codec: CodecSettings | None, out: Path, report: Report) -> Path:
    """The target set that a run reads. Another process that makes the same one is waited for."""
    if codec is None:
        return targets
    name = f"klt-{codec.fidelity:g}" if codec.name == "klt" else codec.name
    folder = out / "targets" / name
    with holding(out / "targets", name, lambda: report.log(f"waiting for {folder}, which another process makes")):
        recode(targets, folder, codec, report)
    return folder
