"""A comparison of many pretraining runs on the same views: train and score what is missing, write one report.

Every run is made by `pretrain` and every score by `evaluate`, each in its own folder. Both resume, and skip finished
work, and so does this stage. A folder is named after its inputs, so grids in one OUT share common runs:

OUT/runs/caev2-s0-1a2b3c4d/             a run: method, seed, fingerprint of settings and stores
OUT/scores/caev2-s0-1a2b3c4d-5e6f7a8b/  its scores: fingerprint of evaluations and data
OUT/targets/klt-0.99-9c0d1e2f/          the target set recoded, if a grid compares codecs
OUT/reports/table2/report.html          the results of one grid
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact, is_artifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.lock import holding
from cae2pipe.artifacts.storage import is_local
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.comparison.gathering import gather_grid
from cae2pipe.comparison.rows import Comparison
from cae2pipe.config.base import fingerprinted, load, merge
from cae2pipe.config.compare import GridSettings, Variant, for_sets
from cae2pipe.config.evaluate import EVALUATIONS, AnySettings, ZeroshotSettings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import BadInputError, Cae2pipeError, DivergedError, OutOfMemoryError, SettingsError
from cae2pipe.evaluation.datasets import open_data
from cae2pipe.evaluation.initialisation import initial_weights
from cae2pipe.evaluation.zeroshot_classes import ClassSource, class_source
from cae2pipe.evaluation.zeroshot_encoders import chosen_head, output_width, refuse_unaligned
from cae2pipe.loading.fresh import fresh_views
from cae2pipe.loading.joining import Joined, join_sets, labels_of
from cae2pipe.loading.planning import chosen_stores
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.device_memory import free_unused
from cae2pipe.runtime.progress import Report, Silent, Within
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.world import stage_world
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot, refuse_other_width
from cae2pipe.stages.pretrain import digests_of, pretrain, teachers_of
from cae2pipe.stages.recode import recode
from cae2pipe.stages.report import write_report
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.training.fit import check_sets
from cae2pipe.training.student import refuse_standardised
from cae2pipe.training.target_spec import target_spec

OPTIONS = {f"speed.{name}": f"{name} (--{name})" for name in ("device", "workers")}
"""How messages call the settings that are given for all runs."""


@dataclass(frozen=True)
class Planned:
    """One run of a grid: the index of its variant, its seed, the names of its folders below runs and scores, its
    settings, the codec that the target sets are recoded with for it, if any, and the indices of its sets."""

    variant: int
    seed: int
    name: str
    scored: str
    settings: PretrainSettings
    codec: CodecSettings | None
    sets: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class GridPlan:
    """The plan of a grid.

    ``grid``: with variants as ``for_sets`` makes them. ``joined``: the target sets, with the stores that all have.
    ``runs``: ordered seed by seed, so that an interrupted grid has complete comparisons. ``evaluations``: of each run.
    """

    grid: GridSettings
    joined: Joined
    runs: list[Planned]
    evaluations: dict[str, AnySettings | ZeroshotSettings]


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


def plan_grid(
    grid: GridSettings,
    targets: Path | Sequence[Path],
    data: Path,
    *,
    out: Path,
    small: bool = False,
    speed: dict[str, Any] | None = None,
) -> GridPlan:
    """The plan of a grid, checked before anything is trained.

    Raises:
        SettingsError: settings of a variant or of an evaluation do not fit each other or the target sets.
        ManifestError, DamageError: not a target set that can be read. SourceError: not labelled images.
        MismatchError: the target sets have no views in common.
        BadInputError: codecs are compared, but a target set's latents are not fp16.
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
    roots = list(targets) if isinstance(targets, Sequence) else [targets]
    refuse_misplaced(roots, data, out)
    joined = join_sets([TargetSet(root) for root in roots])
    grid = for_sets(grid, labels_of(joined.whole))
    expanded = expand(grid, small, speed or {})
    with settings_of_grid():
        joined = located(joined, expanded[0][1].data.pixels)
    plan = GridPlan(grid, joined, [], evaluations)
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
    for index, settings in expanded:
        variant = plan.grid.variants[index]
        chosen = places(variant)
        own = [plan.joined.sets[place] for place in chosen]
        with variant_named(variant.name):
            settings = with_pixels(own[0], weighted(settings, variant, labels_of(own)))
            check_run(own, settings, variant.codec)
            if source and isinstance(zeroshot, ZeroshotSettings):
                check_zeroshot(own, settings, zeroshot, source)
            if settings.model not in digests:
                init = initial_weights(settings.model)
                digests[settings.model] = init.digest if init else None
        stores = chosen_stores(own[0], settings)
        made_from = [[each.artifact.fingerprint, digests_of(each, stores)] for each in own]
        inputs = [*(made_from if len(own) > 1 else made_from[0]), *filter(None, [digests[settings.model]])]
        name = run_name(settings, inputs, variant.codec)
        plan.runs.append(
            Planned(
                variant=index,
                seed=settings.seed,
                name=name,
                scored=f"{name}-{fingerprint(measured)[:8]}",
                settings=settings,
                codec=variant.codec,
                sets=chosen,
            )
        )
    return plan


def refuse_misplaced(targets: Sequence[Path], data: Path, out: Path) -> None:
    """Refuse a target set in the place of images or of the output folder, and an output folder inside of one. Raises
    BadInputError."""
    for place in (data, out):
        if is_artifact(place, "targets"):
            sets = " ".join(map(str, dict.fromkeys([*targets, place])))
            raise SettingsError(
                "this is a target set: labelled images and the output folder come after all target sets",
                where=place,
                fix=f"cae2pipe compare GRID {sets} DATA OUT",
            )
    for root in targets:
        if is_local(root) and root.resolve() in (out.resolve(), *out.resolve().parents):
            raise BadInputError("the output folder is inside the target set", where=out, fix="use another folder")


def places(variant: Variant) -> tuple[int, ...]:
    """The indices of the target sets of a variant that ``for_sets`` made."""
    assert isinstance(variant.sets, tuple)
    return tuple(position - 1 for position in variant.sets)


def weighted(settings: PretrainSettings, variant: Variant, labels: Sequence[str]) -> PretrainSettings:
    """The settings with the variant's weights, under the labels of its teachers. A weight of 1 is not named, so that
    equal runs have equal settings."""
    if variant.weights is None:
        return settings
    weights = {label: weight for label, weight in zip(labels, variant.weights, strict=True) if weight != 1}
    loss = settings.loss.model_copy(update={"teachers": weights or None})
    return settings.model_copy(update={"loss": loss})


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


def located(joined: Joined, given: str | None) -> Joined:
    """The same sets, all of which know the folder with their pixels: as given, or that of another set, since all have
    the same pixels.

    Raises:
        SettingsError: it is not known, or given and no set is one by reference.
    """
    if not any(each.artifact.by_reference for each in joined.sets):
        TargetSet(joined.main.root, pixels=given)
        return joined
    folder = given or next((each.pixels_folder for each in joined.sets if each.pixels_folder), None)

    def opened(targets: TargetSet) -> TargetSet:
        if not targets.artifact.by_reference:
            return targets
        again = TargetSet(targets.root, pixels=folder)
        _ = again.pixels_root
        return again.only(targets.stores)

    main, *others = map(opened, joined.sets)
    return replace(joined, main=main, others=tuple(others))


def with_pixels(targets: TargetSet, settings: PretrainSettings) -> PretrainSettings:
    """The settings of a run, which say where the pixels of its first set lie: also for sets recoded from it."""
    pixels = str(targets.pixels_root) if targets.artifact.by_reference else None
    return settings.model_copy(update={"data": settings.data.model_copy(update={"pixels": pixels})})


def run_name(settings: PretrainSettings, inputs: Any, codec: CodecSettings | None) -> str:
    """The folder name of a run on ``inputs``, plain values that identify targets and initial weights. It depends on
    everything that the result depends on."""
    made_from = [fingerprinted(settings), inputs, codec and fingerprinted(codec)]
    return f"{settings.method}-s{settings.seed}-{fingerprint(made_from)[:8]}"


def check_run(sets: Sequence[TargetSet], settings: PretrainSettings, codec: CodecSettings | None) -> None:
    """Refuse a run that does not fit its target sets, its method or its codec, or whose teacher or originals are
    missing. An online teacher is loaded for this check, which takes seconds and may save hours."""
    targets, *others = sets
    check_sets(Joined(targets, tuple(others)), settings, torchrun_rank().ranks)
    with torch.device("meta"):
        spec = target_spec(settings, targets, others)
        build_method(settings.method, settings.model, spec.dim, spec.summary)
    if settings.views == "fresh":
        fresh_views(targets, settings)
    if settings.targets == "online":
        option = "--set teacher_weights=FILE"
        for label, each in zip(labels_of(sets), sets, strict=True):
            set_teacher(each.artifact, settings.weights_of(label), torch.device("cpu"), option=option)
    for each in sets:
        stored = each.artifact.identity["settings"]["codec"]["name"]
        if codec and stored != "fp16":
            raise BadInputError(
                f"a comparison of codecs needs fp16 latents, but this set is stored with {stored}, whose error would "
                "be added to theirs",
                where=each.root,
                fix="use a set extracted with --codec fp16",
            )


def check_zeroshot(
    sets: Sequence[TargetSet], settings: PretrainSettings, scored: ZeroshotSettings, source: ClassSource
) -> None:
    """Refuse a run that cannot be scored with class embeddings. Raises SettingsError."""
    teachers = teachers_of(sets, [])
    several = len(sets) > 1
    if several:
        refuse_standardised(settings.loss, None)
    number = chosen_head(teachers if several else None, settings.loss, scored.teacher, "evaluate.zeroshot")
    refuse_unaligned(settings.loss, teachers[number], None)
    refuse_other_width(source, output_width(settings.loss, teachers[number]), sets[number].teacher.name)


@contextmanager
def variant_named(name: str) -> Iterator[None]:
    """Within it, errors name the variant, and settings in the form that a grid takes."""
    try:
        with settings_of_grid():
            yield
    except BadInputError as error:
        error.where = f"variant {name!r}" + (f", {error.where}" if error.where else "")
        raise


@contextmanager
def settings_of_grid() -> Iterator[None]:
    """Within it, errors name settings in the form that a grid takes."""
    try:
        yield
    except BadInputError as error:
        error.fix = error.fix and error.fix.replace("--set ", "--set set.")
        raise


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
