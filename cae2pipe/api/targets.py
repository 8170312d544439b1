"""Python API of stage 1: shard sets and target sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.api.path_lists import known_pixels, optional_path
from cae2pipe.api.settings import Overrides, given, option, resolve
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.storage import to_path
from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.config.base import Settings, build
from cae2pipe.config.extract import CodecSettings, ExtractSettings, ShardSettings
from cae2pipe.errors import SettingsError
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.stages.add_teacher import add_teacher, check_added
from cae2pipe.stages.estimate_targets import estimate_targets as estimate
from cae2pipe.stages.extract_targets import extract_targets as extract
from cae2pipe.stages.recode import recode as run_recode
from cae2pipe.stages.repack import repack as run_repack
from cae2pipe.stages.shard import shard_images
from cae2pipe.targets.paths import is_store
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.spelling import teacher_values


@checked
def shard(
    source: str | Path,
    out: str | Path,
    *,
    config: str | Path | Settings = "default",
    overrides: Overrides = None,
    labels: str | Path | None = None,
    expect: str | None = None,
    workers: int | None = None,
    progress: Progress = True,
) -> list[ShardSet]:
    """Pack images into shuffled WebDataset tars: ``cae2pipe shard``.

    Args:
        source: a folder of images, ImageNet's archives, a tar, WebDataset tars, a list of paths, or a URL of one.
        out: the output folder or URL, created or extended with new images.
        config: preset, YAML file or settings.
        overrides: settings to change.
        labels: ground truth of images without classes.
        expect: stop unless the source is exactly this data set.
        workers: processes; -1: one per core, 0: work in this process.

    Returns:
        One shard set, or one per split if the source has splits.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    arguments = {"speed.workers": workers}
    settings = resolve(ShardSettings, "shard", config, overrides=overrides, arguments=arguments)
    with reporting(progress, "shard") as report:
        return shard_images(
            to_path(source),
            to_path(out),
            settings,
            report=report,
            labels=optional_path(labels),
            expected=expect,
        )


def extract_settings(
    config: str | Path | Settings,
    overrides: Overrides,
    *,
    teacher: str | None,
    views: int | None,
    codec: str | None,
    fidelity: float | None,
    workers: int | None,
    device: str | None,
) -> ExtractSettings:
    """The settings of an extraction."""
    arguments = {
        "views": views,
        "codec.name": codec,
        "codec.fidelity": fidelity,
        "speed.workers": workers,
        "speed.device": device,
    }
    replaced = {} if teacher is None else {"teacher": teacher_values(teacher)}
    return resolve(ExtractSettings, "extract", config, overrides=overrides, arguments=arguments, replaced=replaced)


@checked
def extract_targets(
    source: str | Path,
    out: str | Path | None,
    *,
    teacher: str | None = None,
    config: str | Path | Settings = "clip-b16",
    overrides: Overrides = None,
    views: int | None = None,
    codec: str | None = None,
    fidelity: float | None = None,
    by_reference: bool = False,
    add: bool = False,
    pixels: str | Path | None = None,
    part: str = "1/1",
    calibrate_only: bool = False,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = True,
) -> TargetSet | None:
    """Write views and the teacher's latents of them into a target set: ``cae2pipe extract-targets``.

    Args:
        source: a shard set, a folder of images, or a target set, whose views another teacher then sees; a path or a
            URL.
        out: the target set, created or resumed; None with ``add``.
        teacher: ``timm:NAME.TAG``, ``open_clip:NAME/TAG``, ``hf-hub:ORG/NAME``, ``local-dir:PATH`` or a preset, each
            with ``@FILE`` for local weights; it takes the place of the whole teacher in ``config``.
        config: preset, YAML file or settings.
        overrides: settings to change.
        views: per image; None: as the set was started, or 16.
        codec: klt, int8 or fp16.
        fidelity: klt's mean cosine.
        by_reference: list the pixels of ``source``, a target set, by digest, and do not hold them.
        add: add the teacher to ``source``, a target set: a set by reference in its folder ``teachers/LABEL``.
        pixels: the folder or URL with the pixels of a ``source`` that is by reference itself.
        part: ``K/N``, one of N shares of the work.
        calibrate_only: calibrate the codec and stop.
        workers: processes; -1: one per core, 0: work in this process.
        device: auto, cpu, cuda, cuda:1, ...

    Returns:
        The set, or None if it has no view yet.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    settings = extract_settings(
        config,
        overrides,
        teacher=teacher,
        views=views,
        codec=codec,
        fidelity=fidelity,
        workers=workers,
        device=device,
    )
    share, root, folder = parse_part(part), to_path(source), known_pixels(source, pixels)
    if (out is None) != add:
        raise SettingsError(
            "a teacher that is added has its folder inside of the source, and an output folder is given"
            if add
            else "the output folder is missing",
            where="out (OUT)",
            fix="omit it, or omit add (--add)"
            if add
            else "give it, or add the teacher to a target set with add (--add)",
        )
    with reporting(progress, "extract-targets") as report:
        if out is None:
            made = add_teacher(root, settings, report=report, part=share, calibrate_only=calibrate_only, pixels=folder)
        else:
            made = extract(
                root,
                to_path(out),
                settings,
                report=report,
                part=share,
                calibrate_only=calibrate_only,
                by_reference=by_reference,
                pixels=folder,
            )
    if not any(map(is_store, made.units)):
        return None
    return TargetSet(made.root, pixels=TargetSet(root, pixels=folder).pixels_root if made.by_reference else None)


@checked
def estimate_targets(
    source: str | Path,
    *,
    teacher: str | None = None,
    config: str | Path | Settings = "clip-b16",
    overrides: Overrides = None,
    views: int | None = None,
    codec: str | None = None,
    fidelity: float | None = None,
    epochs: int | None = None,
    by_reference: bool = False,
    add: bool = False,
    pixels: str | Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = True,
) -> dict[str, Any]:
    """Estimate size and time of a target set from a few hundred images: ``extract-targets --estimate``.

    Nothing is written.

    Arguments as in ``extract_targets``. With ``epochs``, a number of views is recommended for a pretraining of that
    length. With ``by_reference`` and ``add`` pixels take no bytes. Returns and raises as
    ``cae2pipe.stages.estimate_targets.estimate_targets``.
    """
    settings = extract_settings(
        config,
        overrides,
        teacher=teacher,
        views=views,
        codec=codec,
        fidelity=fidelity,
        workers=workers,
        device=device,
    )
    if add:
        check_added(to_path(source), settings, known_pixels(source, pixels))
    with reporting(progress, "estimate") as report:
        return estimate(
            to_path(source),
            settings,
            report,
            epochs=epochs,
            by_reference=by_reference or add,
            pixels=known_pixels(source, pixels),
        )


@checked
def recode(
    source: str | Path,
    out: str | Path,
    *,
    codec: str | None = None,
    fidelity: float | None = None,
    lossy_source: bool = False,
    repack: bool = False,
    workers: int = -1,
    progress: Progress = True,
) -> TargetSet:
    """Make a target set with another codec or fidelity from an existing one, without the teacher: ``cae2pipe recode``.

    Args:
        source: a target set, preferably of fp16 latents.
        out: the target set, created or resumed.
        codec: klt (the default), int8 or fp16.
        fidelity: klt's mean cosine on held-out images; None: 0.97.
        lossy_source: allow a source that is not fp16.
        repack: only convert a set of an earlier format to the newest one, without changing its latents.
        workers: threads; -1: one per core.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    if repack and (codec is not None or fidelity is not None or lossy_source):
        raise SettingsError(
            "a set that is repacked keeps its codec and its latents",
            where="repack",
            fix="omit codec, fidelity and lossy_source, or recode the repacked set afterwards",
        )
    values = given(name=codec or "klt", fidelity=fidelity)
    options = {"name": option("codec.name"), "fidelity": option("codec.fidelity")}
    settings = build(CodecSettings, values, "recode", options=options)
    with reporting(progress, "recode") as report:
        if repack:
            return TargetSet(run_repack(to_path(source), to_path(out), report=report, workers=workers).root)
        made = run_recode(
            to_path(source), to_path(out), settings, report=report, lossy_source=lossy_source, workers=workers
        )
    return TargetSet(made.root)
