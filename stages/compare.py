"""A comparison of many pretraining runs on the same views: train and score what is missing, write one report.

Every run is made by `pretrain` and every score by `evaluate`, each in its own folder. Both resume, and skip finished
work, and so does this stage. A folder is named after its inputs, so grids in one OUT share common runs:

OUT/runs/caev2-s0-1a2b3c4d/             a run: method, seed, fingerprint of settings and stores
OUT/scores/caev2-s0-1a2b3c4d-5e6f7a8b/  its scores: fingerprint of evaluations and data
OUT/targets/klt-0.99-9c0d1e2f/          the target set recoded, if a grid compares codecs
OUT/reports/table2/report.html          the results of one grid
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.lock import holding
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.comparison.gathering import gather_grid
from cae2pipe.comparison.rows import Comparison
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import ZeroshotSettings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.errors import Cae2pipeError, DivergedError, OutOfMemoryError
from cae2pipe.evaluation.grid_plan import GridPlan, plan_grid, variant_named
from cae2pipe.loading.joining import labels_of
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.device_memory import free_unused
from cae2pipe.runtime.progress import Report, Within
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.world import stage_world
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.report import write_report


def compare(
    grid: GridSettings,
    name: str,
    targets: Path | Sequence[Path],
    *,
    data: Path,
    out: Path,
    report: Report,
    small: bool = False,
    part: WorkShare | None = None,
    speed: dict[str, Any] | None = None,
) -> Comparison | None:
    """Train and score all runs of a grid, or a part of them, and write the report of all results so far.

    Under torchrun the processes share every run; only the leading one gets the result, the others None.

    Args:
        name: of the grid and of its report's folder. targets: the target set, or several of other teachers over the
        same views. data: labelled images, as for evaluations. small: use the grid's small scale. part: this process's
        share of the runs. speed: ``device`` and ``workers`` for all runs.

    Raises:
        As ``plan_grid``, ``recode``, ``pretrain`` and ``evaluate``. If a run diverges or does not fit the device, the
        others still run, and its error is raised at the end.
    """
    speed = speed or {}
    result: Comparison | None = None
    with stage_world(speed.get("device", "auto"), report) as (world, report):
        report.phase("checking the grid")
        plan = world.main_first(lambda: plan_grid(grid, targets, data, out=out, small=small, speed=speed))
        failed = run_part(plan, data=data, out=out, report=report, part=part)
        if world.is_main:
            result = write_grid(name, plan, out=out, report=report, device=world.device, failed=failed)
    if failed:
        raise next(iter(failed.values()))
    return result


def report_grid(
    grid: GridSettings,
    name: str,
    targets: Path | Sequence[Path],
    *,
    data: Path,
    out: Path,
    report: Report,
    small: bool = False,
    speed: dict[str, Any] | None = None,
) -> Comparison:
    """Write the report of a grid's results so far, without running anything. Arguments as in ``compare``."""
    plan = plan_grid(grid, targets, data, out=out, small=small, speed=speed)
    device = pick_device((speed or {}).get("device", "auto"))
    return write_grid(name, plan, out=out, report=report, device=device)


def run_part(
    plan: GridPlan, *, data: Path, out: Path, report: Report, part: WorkShare | None = None
) -> dict[str, Cae2pipeError]:
    """Train and score a part of a grid's runs. Returns the errors of those that could not be finished.

    A loss that is not finite occurs in all processes of a run. But memory may run out in only one of several processes,
    and then the others could not continue.
    """
    forgiven = (DivergedError, OutOfMemoryError) if torchrun_rank().ranks == 1 else (DivergedError,)
    if plan.joined.note:
        report.log(plan.joined.note)
    stores = sorted(plan.joined.main.stores)
    # Variants with equal settings share one run.
    distinct = list({run.name: run for run in plan.runs}.values())
    own = [run for index, run in enumerate(distinct) if part is None or part.owns(index)]
    failed: dict[str, Cae2pipeError] = {}
    for number, run in enumerate(own, 1):
        named = plan.grid.variants[run.variant].name
        variant = f"{named}, seed {run.seed}"
        report.log(f"run {number} of {len(own)}: {variant} ({run.name})")
        within = Within(report, f"run {number} of {len(own)}")
        folder = out / "runs" / run.name
        try:
            with variant_named(named):
                roots = [recoded(plan.joined.sets[place].root, run.codec, out, report=within) for place in run.sets]
                pretrain(roots, folder, run.settings, report=within, stores=stores)
            for kind, settings in plan.evaluations.items():
                scores = out / "scores" / run.scored
                if isinstance(settings, ZeroshotSettings):
                    evaluate_zeroshot(str(folder), data, out=scores, settings=settings, report=within)
                else:
                    evaluate(kind, str(folder), data, out=scores, settings=settings, report=within)
        except forgiven as error:
            failed[f"{variant} ({error.what})"] = without_frames(error)
            report.log(f"{variant} failed: {error.what}; continuing with the other runs")
        # The next run may need all memory of the device.
        free_unused()
    return failed


def without_frames(error: Cae2pipeError) -> Cae2pipeError:
    """The error without its traceback, whose frames would keep the model of a run in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def write_grid(
    name: str,
    plan: GridPlan,
    *,
    out: Path,
    report: Report,
    device: torch.device,
    failed: dict[str, Cae2pipeError] | None = None,
) -> Comparison:
    """Write the report of a grid's results so far, under a lock: several parts may end at the same time."""
    set_backends()
    with holding(out / "reports", name, lambda: report.waits_for("another process to write the report")):
        copies = (path.parent for path in sorted((out / "targets").glob(f"*/{MANIFEST}")))
        runs = [(run.variant, run.name, run.scored) for run in plan.runs]
        sets = [*(each.root for each in plan.joined.sets), *copies]
        result = gather_grid(
            plan.grid, runs, out, sets=sets, labels=labels_of(plan.joined.sets), failed=list(failed or {})
        )
        write_report(result, plan.joined.sets, out / "reports" / name, report=report, device=device)
    return result


def recoded(targets: Path, codec: CodecSettings | None, out: Path, *, report: Report) -> Path:
    """The target set that a run reads. Waits if another process is making the same one."""
    if codec is None:
        return targets
    of = fingerprint([TargetsArtifact.open(targets).fingerprint, fingerprinted(codec)])[:8]
    name = f"{codec.name}-{codec.fidelity:g}-{of}" if codec.name == "klt" else f"{codec.name}-{of}"
    folder = out / "targets" / name
    with holding(out / "targets", name, lambda: report.waits_for(f"another process to make {folder}")):
        recode(targets, folder, codec, report=report)
    return folder
