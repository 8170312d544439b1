"""The runs and evaluations of a comparison, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.storage import is_local
from cae2pipe.config.base import fingerprinted, load, merge
from cae2pipe.config.compare import GridSettings, Variant, for_sets
from cae2pipe.config.evaluate import EVALUATIONS, AnySettings, ZeroshotSettings
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import BadInputError, SettingsError, command
from cae2pipe.evaluation.datasets import open_data
from cae2pipe.evaluation.initialisation import initial_weights
from cae2pipe.evaluation.zeroshot_classes import ClassSource, class_source, refuse_other_width
from cae2pipe.evaluation.zeroshot_encoders import chosen_head, output_width, refuse_unaligned
from cae2pipe.loading.fresh import fresh_views
from cae2pipe.loading.joining import Joined, join_sets, labels_of, located
from cae2pipe.loading.planning import chosen_stores
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.training.fit import check_sets
from cae2pipe.training.run_record import digests_of, teachers_of
from cae2pipe.training.student import refuse_standardised
from cae2pipe.training.target_spec import target_spec

OPTIONS = {f"speed.{name}": f"{name} (--{name})" for name in ("device", "workers")}
"""How messages call the settings that are given for all runs."""
CHOOSE = "set teacher of the zeroshot evaluation to"
"""How they say that a teacher of several is chosen."""


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
            raise SettingsError(
                "this is a target set: labelled images and the output folder come after all target sets",
                where=place,
                fix=command("compare", "GRID", *dict.fromkeys([*targets, place]), "DATA", "OUT"),
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
    number = chosen_head(teachers if several else None, settings.loss, scored.teacher, "evaluate.zeroshot", CHOOSE)
    refuse_unaligned(settings.loss, teachers[number], None, teachers if several else (), CHOOSE)
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
