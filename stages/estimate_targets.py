"""Estimate of stage 1 from a few hundred images: bytes, time and fidelity for every codec. Nothing is kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.config.extract import ExtractSettings, recommend_views
from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.build import plan_runs, write_run
from cae2pipe.shards.checking import Checked, check_image
from cae2pipe.shards.shard_set import ShardSet, make_shard
from cae2pipe.shards.source import scan
from cae2pipe.targets.calibration_sample import run_sample
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.encoding import Meter, encode_ahead, lane_count
from cae2pipe.targets.estimate import CODECS, price, project, sample_size, speed_sample, tar_bytes
from cae2pipe.targets.groups import Groups
from cae2pipe.targets.manifest_facts import teacher_facts
from cae2pipe.targets.rendering import BlockRenderer, RenderedBlock, Renderer, Task, render_blocks
from cae2pipe.targets.shared_pixels import refers_to_nothing
from cae2pipe.targets.stored_source import Source, StoredSource, as_source, renderer_of
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher


def estimate_targets(
    source: Path,
    settings: ExtractSettings,
    report: Report,
    *,
    epochs: int | None = None,
    by_reference: bool = False,
    pixels: Path | None = None,
) -> dict[str, Any]:
    """Estimate the cost of the target set of a shard set, a folder of images or another target set; nothing is written.

    Args:
        epochs: epochs of the planned pretraining; if given, a number of views is recommended.
        by_reference: whether the set will refer to the pixels of the source, a target set, and not hold them.
        pixels: the folder with the pixels of a source that is by reference itself.

    Returns:
        ``images``, ``views``, mean bytes of ``pixels`` per view, ``views_per_s`` and ``teacher_per_s`` on this device,
        and ``codecs``: for each the bytes of ``latents`` per view, and if there are several groups of latents of each
        (``groups``), ``bytes`` and ``seconds`` in total, the held-out ``mean`` and ``p1`` cosine of the patches, and
        ``paid_from_epoch``, the break-even epoch. With ``epochs`` also ``recommended``:
        ``views`` for these ``epochs``, their ``bytes`` and ``seconds`` in total with the codec of ``settings``, how
        often each is shown (``showings``), and how often each would be shown with the ``views`` of ``settings``
        (``showings_asked``). If a student with the set's grid and patches of the default size reads views reduced, also
        ``reduced``: its ``size``, and the mean bytes of ``pixels`` per view if views had this size.

    Raises:
        SettingsError: less than one epoch. MismatchError: settings contradict the views of a target set.
    """
    if epochs is not None and epochs < 1:
        raise SettingsError(f"invalid number of epochs: {epochs}", where="--epochs", fix="use at least 1")
    set_backends()
    stored = StoredSource.of(TargetSet(source, pixels=pixels)) if is_artifact(source, "targets") else None
    if by_reference and not stored:
        raise refers_to_nothing(source)
    if stored:
        settings = as_source(settings, stored.targets)
    report.phase("loading the teacher")
    teacher = load_teacher(settings.teacher, pick_device(settings.speed.device))
    workers = worker_count(settings.speed.workers)
    with tempfile.TemporaryDirectory(prefix="cae2pipe-") as folder:
        shards: Source
        if stored:
            shards, images = stored, stored.images
        elif is_artifact(source, "shards"):
            shards = ShardSet.open_with_images(source)
            images = shards.images
        else:
            report.phase("listing the images")
            shards, images = sample_shards(source, Path(folder), settings, report)
        codec, total = settings.codec, images * settings.views
        sampled = min(images, sample_size(total, codec.calibration))
        report.phase(f"running the teacher on about {sampled} of {images} images")
        outputs, jpegs = run_sample(shards, teacher, settings, images=sampled, workers=workers, report=report)
        facts = teacher_facts(teacher, outputs[0])
        student, reduced = facts["rows"] * ModelSettings().patch_size, None
        if isinstance(shards, ShardSet) and settings.teacher.grid is not None and student < settings.view.size:
            reduced = reduced_share(shards, jpegs, settings, student)
        report.phase("trying the codecs on them")
        report.total(len(CODECS), "codecs")
        prices = []
        for name in CODECS:
            prices.append(price(outputs, name, facts, fidelity=codec.fidelity, level=codec.level))
            report.advance()
        report.phase("extracting from them to measure the speed")
        chosen = next(priced for priced in prices if priced.codec == codec.name)
        meter = time_extraction(
            renderer_of(shards, speed_sample(shards.shards, settings.views, total), settings),
            teacher,
            chosen.groups,
            settings=settings,
            workers=workers,
            report=report,
        )

    def pixel_bytes(views: int) -> float:
        """Bytes per view: its own, or its share of the image that ``views`` views are cut from."""
        return 0.0 if by_reference else tar_bytes(jpegs) / (views if settings.view.pixels == "replayed" else 1)

    teacher_per_s = meter.views / meter.teacher
    rows = []
    for priced in prices:
        whole = project(
            images,
            settings.views,
            pixel_bytes(settings.views) + priced.latents,
            extracted_per_s=meter.rate(),
            teacher_per_s=teacher_per_s,
        )
        reached = {"mean": priced.fidelity.mean, "p1": priced.fidelity.p1}
        groups = {name: round(size) for name, size in priced.by_group.items()}
        more = {"groups": groups} if len(groups) > 1 else {}
        rows.append({"codec": priced.codec, "latents": round(priced.latents), **more, **reached, **asdict(whole)})
    result = {
        "images": images,
        "views": settings.views,
        "pixels": round(pixel_bytes(settings.views)),
        "views_per_s": meter.rate(),
        "teacher_per_s": teacher_per_s,
        "verdict": meter.bottleneck(),
        "codecs": rows,
    }
    if reduced is not None:
        result["reduced"] = {"size": student, "pixels": round(reduced * pixel_bytes(settings.views))}
    if epochs is not None:
        views = recommend_views(epochs)
        whole = project(
            images,
            views,
            pixel_bytes(views) + chosen.latents,
            extracted_per_s=meter.rate(),
            teacher_per_s=teacher_per_s,
        )
        result["recommended"] = {
            "epochs": epochs,
            "views": views,
            "bytes": whole.bytes,
            "seconds": whole.seconds,
            "showings": epochs / views,
            "showings_asked": epochs / settings.views,
        }
    return result


def reduced_share(shards: ShardSet, jpegs: Sequence[bytes], settings: ExtractSettings, size: int) -> float:
    """Bytes of pixels if views had ``size`` pixels, as a share of what they are now, over one block of images.

    ``jpegs``: what the set keeps of these images, and of others after them."""
    view = settings.view.model_copy(update={"size": size})
    block = Renderer(shards, [Task(shards.shards[0], 0, (0,))], view, seed=settings.seed)[0]
    smaller = block.kept or block.jpegs[0]
    return tar_bytes(smaller) / tar_bytes(jpegs[: len(smaller)])


def sample_shards(source: Path, folder: Path, settings: ExtractSettings, report: Report) -> tuple[ShardSet, int]:
    """The first images that would be sharded, as a shard set in ``folder``; and the total number of images."""
    scanned = scan(source)
    entries = [entry for run in plan_runs([scanned.entries], settings.shard).values() for entry in run]
    entries = entries[: sample_size(len(entries) * settings.views, settings.codec.calibration)]
    report.phase("checking the first images")
    report.total(len(entries), "images")

    def checked() -> Iterator[Checked]:
        for entry in entries:
            yield check_image(scanned.piece(entry))
            report.advance()

    unit = write_run(folder, "000000", entries, images=checked())
    if not unit["samples"]:
        raise SourceError(
            f"none of the first {len(entries)} images can be decoded", where=source, fix="check the source"
        )
    return ShardSet(folder, scanned.classes, [make_shard(folder, "000000", unit)]), len(scanned.entries)


def time_extraction(
    renderer: BlockRenderer,
    teacher: Teacher,
    groups: Groups,
    *,
    settings: ExtractSettings,
    workers: int,
    report: Report,
) -> Meter:
    """Render, encode and pack views of a few blocks, as concurrently as an extraction."""
    report.total(
        sum(len(task.views) * min(BLOCK, task.shard.samples - task.block * BLOCK) for task in renderer.tasks), "views"
    )
    meter, lanes = Meter(), lane_count(settings.speed.lanes, teacher.device)

    def begun(rendered: Iterator[RenderedBlock]) -> Iterator[RenderedBlock]:
        # Workers take seconds to start, once per run, which is not timed. A single item is made without them.
        first = next(rendered)
        if len(renderer) > 1:
            meter.began = time.perf_counter()
        yield first
        yield from rendered

    rendered = begun(render_blocks(renderer, workers))
    for encoded in encode_ahead(rendered, teacher, groups, meter=meter, lanes=lanes):
        report.advance(len(encoded.rendered.keys))
    meter.ended = time.perf_counter()
    return meter
