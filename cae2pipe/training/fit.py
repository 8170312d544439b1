"""Checks before training that student, target set and number of processes fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.images.jpeg import device_decoder
from cae2pipe.loading.joining import Joined, labels_of
from cae2pipe.methods.registry import check_method
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import teacher_weights


def check_fit(targets: TargetSet, settings: PretrainSettings, ranks: int) -> None:
    """Refuse a student that does not fit the target set, a batch that cannot be divided among the processes, or a
    decoder that is not installed. Raises SettingsError."""
    check_method(settings.method)
    check_parts(settings, ranks)
    if settings.data.decode == "device":
        device_decoder()
    check_views(targets, settings)
    if settings.data.views is not None and settings.data.views > targets.views:
        raise SettingsError(
            f"data.views is {settings.data.views}, but the target set has {counted(targets.views, 'view')} of each "
            "image",
            where=str(targets.root),
            fix=f"--set data.views={targets.views}, or extract more: --views {settings.data.views}",
        )
    if targets.images < settings.loaded_batch:
        raise SettingsError(
            f"the target set has {counted(targets.images, 'image')}, fewer than one batch of {settings.loaded_batch}",
            where=str(targets.root),
            fix=smaller_batch(targets.images, settings, ranks),
        )


def check_sets(joined: Joined, settings: PretrainSettings, ranks: int) -> None:
    """Refuse settings that do not fit one or several sets, as ``check_joined`` and ``check_fit``. Raises
    SettingsError."""
    check_joined(joined, settings)
    # Of several sets, those with a summary give one.
    loss = settings.loss.model_copy(update={"summary": None} if joined.others else {})
    check_fit(joined.main, settings.model_copy(update={"loss": loss}), ranks)


def check_joined(joined: Joined, settings: PretrainSettings) -> None:
    """Refuse settings that do not fit the number of teachers. Raises SettingsError."""
    sets = (joined.main, *joined.others)
    loss = settings.loss
    if not joined.others:
        if loss.teachers is not None or loss.drop_teachers:
            name = "loss.drop_teachers" if loss.teachers is None else "loss.teachers"
            raise SettingsError(
                f"{name} is for several teachers, and there is one target set",
                where=str(joined.main.root),
                fix=f"omit {name}, or give the target sets of all teachers",
            )
        return
    if loss.target == "pixels":
        raise SettingsError(
            "pixel targets have no teacher, and there are several target sets",
            where="loss.target",
            fix="give one target set, or omit loss.target=pixels",
        )
    if loss.summary and all(each.teacher.summary is None for each in sets):
        check_views(joined.main, settings)
    labels = labels_of(sets)
    teacher_weights(loss, labels, "loss.teachers")
    if settings.targets == "online" and isinstance(settings.teacher_weights, Path):
        raise SettingsError(
            "teacher_weights is one file, and there are several teachers",
            where="teacher_weights",
            fix=f"--set 'teacher_weights={{{labels[0]}: FILE, {labels[1]}: FILE}}', of those whose weights are local",
        )
    if isinstance(settings.teacher_weights, dict) and (
        unknown := sorted(settings.teacher_weights.keys() - set(labels))
    ):
        raise SettingsError(
            f"teacher_weights gives a file to {unknown[0]!r}, which is no teacher of these target sets",
            where="teacher_weights",
            fix=f"use {', '.join(labels)}",
        )
    for other in joined.others:
        check_views(other, of_further_teacher(settings))


def of_further_teacher(settings: PretrainSettings) -> PretrainSettings:
    """What is asked of the views of all teachers but the first, which guides masks. A summary is aligned where there
    is one."""
    mask = settings.mask.model_copy(update={"strategy": "block"})
    return settings.model_copy(update={"mask": mask, "loss": settings.loss.model_copy(update={"summary": None})})


def smaller_batch(images: int, settings: PretrainSettings, ranks: int) -> str:
    """The largest batch of ``images`` for these settings, with as few streams as processes if there are too few
    images for the present ones."""
    streams = settings.data.streams if images >= settings.data.streams else ranks
    batch = images // streams * streams * settings.mask.repeat
    if not batch:
        return f"use at most {images} processes, or more images"
    changed = "" if streams == settings.data.streams else f" --set data.streams={streams}"
    return f"--set data.batch={batch}{changed}, or less; lr scales with the batch"


def check_held_out(held_out: Sequence[TargetSet], sets: Sequence[TargetSet], settings: PretrainSettings) -> None:
    """Refuse held-out targets that the student cannot be measured on. Raises SettingsError.

    Args:
        held_out: one set for each of ``sets``, in any order.
    """
    trained = {place for each in sets for place in (each.root, each.root.resolve())}
    if again := next((each for each in held_out if {each.root, each.root.resolve()} & trained), None):
        raise SettingsError(
            "this is the target set that is trained on, so nothing is held out",
            where=str(again.root),
            fix="extract targets of other images with the same teacher, and give them as --probe-targets",
        )
    roots, names = ", ".join(str(each.root) for each in held_out), ", ".join(each.label for each in sets)
    fix = f"give --probe-targets once for each teacher: {names}"
    if settings.loss.target == "pixels" and len(held_out) > 1:
        raise SettingsError("pixel targets have no teacher, and there are several held-out sets", where=roots, fix=fix)
    if settings.loss.target != "pixels":
        for each in held_out:
            if not any(one_teacher(each, other) for other in sets):
                raise SettingsError(
                    f"teacher mismatch: trained on {', '.join(other.teacher.name for other in sets)}, held-out targets "
                    f"of {each.teacher.name}, or of other weights",
                    where=str(each.root),
                    fix="extract them with the teacher of the target set that is trained on",
                )
        for other in sets:
            if not any(one_teacher(each, other) for each in held_out):
                raise SettingsError(f"there are no held-out targets of {other.label}", where=roots, fix=fix)
    for number, each in enumerate(paired(held_out, sets)):
        check_views(each, of_further_teacher(settings) if number else settings)


def one_teacher(held_out: TargetSet, targets: TargetSet) -> bool:
    """Whether two sets are of the same teacher, perhaps at another precision."""
    one, other = ({**each.artifact.identity["teacher"], "precision": None} for each in (held_out, targets))
    return one == other


def paired(held_out: Sequence[TargetSet], sets: Sequence[TargetSet]) -> list[TargetSet]:
    """Held-out sets in the order of the sets of their teachers."""
    if len(held_out) == 1:
        return list(held_out)
    return [each for other in sets for each in held_out if one_teacher(each, other)]


def check_views(targets: TargetSet, settings: PretrainSettings) -> None:
    """Refuse targets whose views, grid, attention or summary do not fit the student. Raises SettingsError."""
    teacher, grid = targets.teacher, settings.model.grid
    guided = settings.mask.strategy == "attention"
    if guided and not targets.layout.attention:
        raise SettingsError(
            f"mask.strategy is attention, but {teacher.name} has no attention",
            where=str(targets.root),
            fix="--set mask.strategy=block, or make targets with a teacher that gives attention, a plain ViT",
        )
    if settings.loss.summary and teacher.summary is None:
        raise SettingsError(
            f"loss.summary is true, but the target set has no summary of {teacher.name}",
            where=str(targets.root),
            fix="omit loss.summary, or make targets with --set teacher.summary=true",
        )
    if (guided or settings.loss.target != "pixels") and (teacher.rows, teacher.cols) != (grid, grid):
        raise SettingsError(
            f"grid mismatch: student {grid} x {grid} patches, target set {teacher.rows} x {teacher.cols}",
            where=f"{targets.root}, teacher {teacher.name}",
            fix=ways_to_fit(targets, settings.model, own_grid=True),
        )
    if targets.view_size < settings.model.image_size:
        raise SettingsError(
            f"image size mismatch: student {settings.model.image_size} pixels, stored views {targets.view_size}",
            where=str(targets.root),
            fix=ways_to_fit(targets, settings.model, own_grid=guided or settings.loss.target != "pixels"),
        )
    if settings.targets == "online" and targets.view_size != settings.model.image_size:
        raise SettingsError(
            f"an online teacher sees the student's {settings.model.image_size} pixels, but the stored latents are of "
            f"views of {targets.view_size}",
            where=str(targets.root),
            fix=f"--set targets=cached, or --set model.image_size={targets.view_size}",
        )


def ways_to_fit(targets: TargetSet, model: ModelSettings, *, own_grid: bool) -> str:
    """How student and target set can be made to fit: the fewest settings of the student, or else one of the set.

    ``own_grid``: whether the student must have the set's grid.
    """
    rows, cols, views = targets.teacher.rows, targets.teacher.cols, targets.view_size
    if not own_grid:
        return f"--set model.image_size={views - views % model.patch_size}"
    ways = []
    if rows == cols <= views:
        side = rows * model.patch_size
        if side <= views and side != model.image_size:
            ways.append(f"--set model.image_size={side}")
        elif model.image_size <= views and model.image_size % rows == 0:
            ways.append(f"--set model.patch_size={model.image_size // rows}")
        else:
            patch = views // rows
            ways.append(f"--set model.image_size={rows * patch} --set model.patch_size={patch}")
    if model.grid == rows == cols:
        ways.append(f"make targets with --set view.size={model.image_size}")
    elif model.grid <= min(rows, cols):
        ways.append(f"make targets with --set 'teacher.grid=[{model.grid},{model.grid}]'")
    return ", or ".join(ways) or "make targets with a teacher that has the student's grid"


def check_parts(settings: PretrainSettings, ranks: int) -> None:
    """Refuse streams that the number of processes does not divide, and a share of the batch that speed.accumulation
    does not divide. Raises SettingsError."""
    streams = settings.data.streams
    if streams % ranks:
        raise SettingsError(
            f"data.streams ({streams}) is not divisible by the number of processes ({ranks})",
            where="data.streams",
            fix=f"set data.streams to a multiple of {ranks} that divides data.batch, or change the number of processes",
        )
    share = settings.loaded_batch // ranks
    if share % settings.speed.accumulation:
        near = max(n for n in range(1, settings.speed.accumulation + 1) if share % n == 0)
        raise SettingsError(
            f"the views per step and process ({share}) are not divisible by speed.accumulation "
            f"({settings.speed.accumulation})",
            where="speed.accumulation",
            fix=f"--set speed.accumulation={near}",
        )
