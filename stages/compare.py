"""A comparison of many pretraining runs on one target set: train and score what is missing, write one report.

Every run is made by `pretrain` and every score by `evaluate`, each in its own folder. Both resume, and skip finished
work, and so does this stage. A folder is named after its inputs, so grids in one OUT share common runs:

OUT/runs/caev2-s0-1a2b3c4d/             a run: method, seed, fingerprint of settings and stores
OUT/scores/caev2-s0-1a2b3c4d-5e6f7a8b/  its scores: fingerprint of evaluations and data
OUT/targets/klt-0.99-9c0d1e2f/          the target set recoded, if a grid compares codecs
OUT/reports/table2/report.html          the results of one grid
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.lock import holding
from cae2pipe.artifacts.manifest_targets import listed
from cae2pipe.artifacts.storage import is_local
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.comparison.gathering import gather_grid
from cae2pipe.comparison.rows import Comparison
from cae2pipe.config.base import fingerprinted, load, merge
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import EVALUATIONS, AnySettings, ZeroshotSettings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import BadInputError, Cae2pipeError, DivergedError, OutOfMemoryError, SettingsError
from cae2pipe.evaluation.datasets import open_data
from cae2pipe.evaluation.initialisation import initial_weights
from cae2pipe.evaluation.zeroshot_classes import class_source
from cae2pipe.evaluation.zeroshot_encoders import refuse_unaligned, summary_width
from cae2pipe.loading.fresh import fresh_views
from cae2pipe.loading.planning import chosen_stores
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.device_memory import free_unused
from cae2pipe.runtime.progress import Report, Silent, Within
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.world import stage_world
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot, refuse_other_width
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.report import write_report
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.training.fit import check_fit
from cae2pipe.training.target_spec import target_spec

OPTIONS = {f"speed.{name}": f"{name} (--{name})" for name in ("device", "workers")}
"""How messages call the settings that are given for all runs."""


@dataclass(frozen=True)
class Planned:
    """One run of a grid: the index of its variant, its seed, the names of its folders below runs and scores, its
    settings, and the codec that the target set is recoded with for it, if any."""

    variant: int
    seed: int
    name: str
    scored: str
    settings: PretrainSettings
    codec: CodecSettings | None


@dataclass(frozen=True)
class GridPlan:
    """The plan of a grid: its runs and the evaluations of each. Runs are ordered seed by seed, so that an interrupted
    grid has complete comparisons."""

    runs: list[Planned]
    evaluations: dict[str, AnySettings | ZeroshotSettings]


def compare(
    grid: GridSettings,
    name: str,
    targets: Path,
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
        name: of the grid and of its report's folder. targets: the target set. data: labelled images, as for
        evaluations. small: use the grid's small scale. part: this process's share of the runs. speed: ``device`` and
        ``workers`` for all runs.

    Raises:
        As ``plan_grid``, ``recode``, ``pretrain`` and ``evaluate``. If a run diverges or does not fit the device, the
        others still run, and its error is raised at the end.
    """
    speed = speed or {}
    result: Comparison | None = None
    with stage_world(speed.get("device", "auto"), report) as (world, report):
        report.phase("checking the grid")
        plan = world.main_first(lambda: plan_grid(grid, targets, data, out=out, small=small, speed=speed))
        failed = run_part(grid, plan, targets, data=data, out=out, report=report, part=part)
        if world.is_main:
            result = write_grid(
                grid, name, plan, targets=targets, out=out, report=report, device=world.device, failed=failed
            )
    if failed:
        raise next(iter(failed.values()))
    return result


def report_grid(
    grid: GridSettings,
    name: str,
    targets: Path,
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
    return write_grid(grid, name, plan, targets=targets, out=out, report=report, device=device)


def plan_grid(
    grid: GridSettings,
    targets: Path,
    data: Path,
    *,
    out: Path,
    small: bool = False,
    speed: dict[str, Any] | None = None,
) -> GridPlan:
    """The plan of a grid, checked before anything is trained.

    Raises:
        SettingsError: settings of a variant or of an evaluation do not fit each other or the target set.
        ManifestError, DamageError: not a target set that can be read. SourceError: not labelled images.
        BadInputError: codecs are compared, but the target set's latents are not fp16.
    """
    if small and not grid.small and not any(variant.small for variant in grid.variants):
        raise SettingsError("this grid has no small scale", where=grid.title, fix="omit --small")
    evaluations: dict[str, AnySettings | ZeroshotSettings] = {}
    for scored in grid.evaluate:
        values = merge(scored.set, {"speed": speed} if speed else {})
        evaluations[scored.kind] = load(
            EVALUATIONS[scored.kind],
            "evaluate",
            scored.config or scored.kind,
            overrides=(),
            values=values,
            options=OPTIONS if speed else {},
        )
    target_set = TargetSet(targets)
    if is_local(targets) and targets.resolve() in (out.resolve(), *out.resolve().parents):
        raise BadInputError("the output folder is inside the target set", where=out, fix="use another folder")
    digests: dict[ModelSettings, str | None] = {}
    splits = open_data(data, batch=1)
    zeroshot = evaluations.get("zeroshot")
    source = None
    if isinstance(zeroshot, ZeroshotSettings):
        source = class_source(zeroshot, splits[1].classes, torch.device("cpu"), Silent())
    measured = [
        [split.identity for split in splits],
        {kind: fingerprinted(own) for kind, own in evaluations.items()},
        *([source.identity] if source else []),
    ]
    runs, teacher = [], target_set.artifact.facts["teacher"]
    for index, settings in expand(grid, small, speed or {}):
        variant = grid.variants[index]
        with variant_named(variant.name):
            settings = with_pixels(target_set, settings)
            check_run(target_set, settings, variant.codec)
            if source:
                refuse_unaligned(settings.loss, teacher, None)
                width = summary_width(settings.loss, teacher) or teacher["dim"]
                refuse_other_width(source, width, target_set.teacher.name)
            if settings.model not in digests:
                init = initial_weights(settings.model)
                digests[settings.model] = init.digest if init else None
        stores = {name: fingerprint(listed(target_set.stores[name])) for name in chosen_stores(target_set, settings)}
        inputs = [target_set.artifact.fingerprint, stores, *filter(None, [digests[settings.model]])]
        name = run_name(settings, inputs, variant.codec)
        scored_as = f"{name}-{fingerprint(measured)[:8]}"
        runs.append(
            Planned(
                variant=index, seed=settings.seed, name=name, scored=scored_as, settings=settings, codec=variant.codec
            )
        )
    return GridPlan(runs, evaluations)


def expand(grid: GridSettings, small: bool, speed: dict[str, Any]) -> list[tuple[int, PretrainSettings]]:
    """The settings of every run, seed by seed, each with the index of its variant. Raises SettingsError."""
    common = merge(grid.set, grid.small) if small else grid.set
    runs = []
    for seed in grid.seeds:
        for index, variant in enumerate(grid.variants):
            own = merge(variant.set, variant.small) if small else variant.set
            values = merge(merge(merge(common, own), {"seed": seed}), {"speed": speed} if speed else {})
            with variant_named(variant.name):
                runs.append((index, load(PretrainSettings, "pretrain", grid.config, overrides=(), values=values)))
    return runs


def with_pixels(targets: TargetSet, settings: PretrainSettings) -> PretrainSettings:
    """The settings of a run, which say where the pixels of a set by reference lie: also for sets recoded from it.

    Raises:
        SettingsError: it is not known.
    """
    if not targets.artifact.by_reference:
        return settings
    pixels = TargetSet(targets.root, pixels=settings.data.pixels).pixels_root
    return settings.model_copy(update={"data": settings.data.model_copy(update={"pixels": str(pixels)})})


def run_name(settings: PretrainSettings, inputs: Any, codec: CodecSettings | None) -> str:
    """The folder name of a run on ``inputs``, plain values that identify targets and initial weights. It depends on
    everything that the result depends on."""
    made_from = [fingerprinted(settings), inputs, codec and fingerprinted(codec)]
    return f"{settings.method}-s{settings.seed}-{fingerprint(made_from)[:8]}"


def check_run(targets: TargetSet, settings: PretrainSettings, codec: CodecSettings | None) -> None:
    """Refuse a run that does not fit the target set, its method or its codec, or whose teacher or originals are
    missing. An online teacher is loaded for this check, which takes seconds and may save hours."""
    check_fit(targets, settings, torchrun_rank().ranks)
    with torch.device("meta"):
        spec = target_spec(settings, targets)
        build_method(settings.method, settings.model, spec.dim, spec.summary)
    if settings.views == "fresh":
        fresh_views(targets, settings)
    if settings.targets == "online":
        option = "--set teacher_weights=FILE"
        set_teacher(targets.artifact, settings.weights_of(targets.label), torch.device("cpu"), option=option)
    stored = targets.artifact.identity["settings"]["codec"]["name"]
    if codec and stored != "fp16":
        raise BadInputError(
            f"a comparison of codecs needs fp16 latents, but this set is stored with {stored}, whose error would be "
            "added to theirs",
            where=targets.root,
            fix="use a set extracted with --codec fp16",
        )


@contextmanager
def variant_named(name: str) -> Iterator[None]:
    """Within it, errors name the variant, and settings in the form that a grid takes."""
    try:
        yield
    except BadInputError as error:
        error.where = f"variant {name!r}" + (f", {error.where}" if error.where else "")
        error.fix = error.fix and error.fix.replace("--set ", "--set set.")
        raise


def run_part(
    grid: GridSettings,
    plan: GridPlan,
    targets: Path,
    *,
    data: Path,
    out: Path,
    report: Report,
    part: WorkShare | None = None,
) -> dict[str, Cae2pipeError]:
    """Train and score a part of a grid's runs. Returns the errors of those that could not be finished.

    A loss that is not finite occurs in all processes of a run. But memory may run out in only one of several processes,
    and then the others could not continue.
    """
    forgiven = (DivergedError, OutOfMemoryError) if torchrun_rank().ranks == 1 else (DivergedError,)
    # Variants with equal settings share one run.
    distinct = list({run.name: run for run in plan.runs}.values())
    own = [run for index, run in enumerate(distinct) if part is None or part.owns(index)]
    failed: dict[str, Cae2pipeError] = {}
    for number, run in enumerate(own, 1):
        variant = f"{grid.variants[run.variant].name}, seed {run.seed}"
        report.log(f"run {number} of {len(own)}: {variant} ({run.name})")
        within = Within(report, f"run {number} of {len(own)}")
        folder = out / "runs" / run.name
        try:
            with variant_named(grid.variants[run.variant].name):
                pretrain(recoded(targets, run.codec, out, report=within), folder, run.settings, report=within)
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
    grid: GridSettings,
    name: str,
    plan: GridPlan,
    *,
    targets: Path,
    out: Path,
    report: Report,
    device: torch.device,
    failed: dict[str, Cae2pipeError] | None = None,
) -> Comparison:
    """Write the report of a grid's results so far, under a lock: several parts may end at the same time."""
    set_backends()
    with holding(out / "reports", name, lambda: report.waits_for("another process to write the report")):
        sets = [targets, *(path.parent for path in sorted((out / "targets").glob(f"*/{MANIFEST}")))]
        runs = [(run.variant, run.name, run.scored) for run in plan.runs]
        result = gather_grid(grid, runs, out, sets=sets, failed=list(failed or {}))
        pixels = plan.runs[0].settings.data.pixels
        write_report(result, targets, out / "reports" / name, report=report, device=device, pixels=pixels)
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
