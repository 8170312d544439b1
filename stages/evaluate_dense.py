"""Stage 3 on pixels and boxes: train a decoder with the encoder, score it, write ``result.json`` and pictures.

Read from top to bottom. Under torchrun every process runs all of this on its share of the images; the leading one
writes. Needs the extra ``dense``.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.box import ScoresBox
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity
from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.dense.box_crops import BoxReader
from cae2pipe.dense.coco import open_coco, told_left_out
from cae2pipe.dense.detect import DetectLearner, build_detector, drawn_detections
from cae2pipe.dense.label_crops import LabelCropReader
from cae2pipe.dense.label_maps import open_label_maps
from cae2pipe.dense.segment import SegmentLearner, build_segmenter, drawn_predictions
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.backbone import prepared_encoder
from cae2pipe.evaluation.encoders import display_name, load_encoder
from cae2pipe.evaluation.result_store import open_scores, save_result
from cae2pipe.evaluation.weights import save_weights
from cae2pipe.reporting.box_pictures import box_sheet
from cae2pipe.reporting.label_pictures import label_sheet
from cae2pipe.reporting.pictures import png_bytes
from cae2pipe.runtime.device import pick_device, resolve_precision, set_backends
from cae2pipe.runtime.progress import Report, Silent
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.world import joined
from cae2pipe.supervised.course import check_share, full_batches
from cae2pipe.supervised.loop import train
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.training.compilation import compiles

LAST, PICTURES = "last.safetensors", "pictures.png"


def segment(spec: str, data: Path, out: Path, settings: SegmentSettings, report: Report) -> dict[str, Any]:
    """Train UperNet on the encoder ``spec`` and label maps, and score it, into ``out``/segment.

    Args:
        data: holds images/{train,val} and annotations/{train,val}, and what its classes are called.

    Returns:
        What ``result.json`` holds; {} in all but the leading process.

    Raises:
        SourceError, SettingsError, ManifestError, TeacherError, MismatchError, DamageError, DivergedError,
        OutOfMemoryError: see their messages.
    """
    require_dense()
    rank = torchrun_rank()
    device = pick_device(settings.speed.device, rank)
    precision = resolve_precision(settings.precision, device)
    set_backends(precision == "bf16", fixed_shapes=True)
    with joined(rank, device, "ddp", rank.ranks, timedelta(hours=2)) as world, ExitStack() as stack:
        report = report if world.leads else Silent()
        train_part, val_part = world.lead_first(lambda: open_label_maps(data, settings))
        encoder = world.lead_first(lambda: load_encoder(spec, settings.seed, device))
        world.lead(lambda: stack.enter_context(writing(out)))
        root = out / "segment"
        asked = {
            "evaluation": "segment",
            "settings": identity(settings) | {"precision": precision},
            "encoder": encoder.identity,
            "data": {"train": train_part.identity, "val": val_part.identity, "classes": train_part.classes},
        }
        box, result = world.lead(lambda: open_scores(root, asked))
        if result:
            report.log(f"nothing to do: {root} holds this score, mIoU {result['miou']:.4f}")
            return result if world.leads else {}
        for note in (*train_part.notes, *val_part.notes):
            report.log(note)
        check_share(settings.batch // settings.chunk, world.ranks)
        course = full_batches(len(train_part), settings.batch, settings.chunk, 1, settings.seed, settings.steps)
        backbone = prepared_encoder(
            encoder,
            spec,
            image_size=settings.image_size,
            layer_scale=settings.layer_scale,
            drop_path=settings.drop_path,
            relative_positions=settings.relative_positions,
        )
        compiled = compiles(settings.speed.compile, device)
        segmenter = build_segmenter(backbone, len(train_part.classes), settings)
        learner = SegmentLearner(segmenter, settings, course, precision == "bf16", compiled, world, val_part)
        own = course.own(world.rank, world.ranks)
        history = train(
            learner,
            course,
            lambda start: LabelCropReader(train_part, course, own, start, settings, segmenter.normalise.mean),
            root=root,
            settings=settings,
            world=world,
            report=report,
        )
        # A run that was killed behind its last step has them still to make.
        scores = learner.scores or learner.score()
        if not world.leads:
            return {}
        sheet = label_sheet(drawn_predictions(learner, val_part, settings.pictures), len(val_part.classes))
        protocol = (
            f"UperNet, AdamW, lr {settings.lr:g} x batch / 16, layer decay {settings.layer_decay:g}, batch "
            f"{settings.batch}, {settings.steps} steps, windows of {settings.image_size} every {settings.stride}, one "
            "scale"
        )
        counts = {"train": len(train_part), "val": len(val_part)}
        picture = None if sheet is None else png_bytes(sheet)
        found = {**scores, "protocol": protocol, "classes": len(train_part.classes), "images": counts}
        return finish(box, spec, segmenter, picture, history, found)


def detect(spec: str, data: Path, out: Path, settings: DetectSettings, report: Report) -> dict[str, Any]:
    """Train Mask R-CNN, or its cascade, on the encoder ``spec`` and COCO's format, and score it, into ``out``/detect.

    Args:
        data: holds train2017, val2017 and annotations/instances_{train2017,val2017}.json.

    Returns, raises: as ``segment``.
    """
    require_dense()
    rank = torchrun_rank()
    device = pick_device(settings.speed.device, rank)
    precision = resolve_precision(settings.precision, device)
    set_backends(precision == "bf16")  # images have many sizes: trying algorithms for each would never end
    with joined(rank, device, "ddp", rank.ranks, timedelta(hours=2)) as world, ExitStack() as stack:
        report = report if world.leads else Silent()
        train_part, val_part = world.lead_first(lambda: open_coco(data, settings.upright))
        encoder = world.lead_first(lambda: load_encoder(spec, settings.seed, device))
        world.lead(lambda: stack.enter_context(writing(out)))
        root = out / "detect"
        asked = {
            "evaluation": "detect",
            "settings": identity(settings) | {"precision": precision},
            "encoder": encoder.identity,
            "data": {"train": train_part.identity, "val": val_part.identity},
        }
        box, result = world.lead(lambda: open_scores(root, asked))
        if result:
            report.log(f"nothing to do: {root} holds this score, AP^b {result['ap_box']:.4f}")
            return result if world.leads else {}
        left_out = {"train": train_part.left_out, "val": val_part.left_out}
        for line in (line for part, counts in left_out.items() for line in told_left_out(part, counts)):
            report.log(line)
        check_share(settings.batch // settings.chunk, world.ranks)
        course = full_batches(len(train_part), settings.batch, settings.chunk, settings.epochs, settings.seed)
        backbone = prepared_encoder(
            encoder,
            spec,
            image_size=None,
            layer_scale=settings.layer_scale,
            drop_path=settings.drop_path,
            relative_positions=False,
        )
        detector = build_detector(backbone, len(train_part.classes), settings)
        learner = DetectLearner(detector, settings, course, precision == "bf16", world, val_part)
        own = course.own(world.rank, world.ranks)
        history = train(
            learner,
            course,
            lambda start: BoxReader(train_part, course, own, start, settings, detector.normalise.mean),
            root=root,
            settings=settings,
            world=world,
            report=report,
        )
        # A run that was killed behind its last step has them still to make.
        scores = learner.scores or learner.score()
        if not world.leads:
            return {}
        picture = box_sheet(drawn_detections(learner, settings.pictures), val_part.classes)
        name = "Cascade Mask R-CNN" if settings.cascade else "Mask R-CNN"
        protocol = (
            f"{name}, AdamW, lr {settings.lr:g} x batch / 16, layer decay {settings.layer_decay:g}, batch "
            f"{settings.batch}, {settings.epochs} epochs, short side {max(settings.short_sides)}, one scale"
        )
        counts = {"train": len(train_part), "val": len(val_part)}
        found = {**scores, "protocol": protocol, "classes": len(train_part.classes), "images": counts}
        found["left_out"] = left_out
        return finish(box, spec, detector, picture, history, found)


def finish(
    box: ScoresBox,
    spec: str,
    network: Normalised,
    picture: bytes | None,
    history: list[dict[str, Any]],
    found: dict[str, Any],
) -> dict[str, Any]:
    """Write weights, pictures and result down, and close the box."""
    asked = box.identity
    save_weights(network.model, box.root / LAST)
    files = {LAST: file_entry(box.root / LAST)}
    if picture is not None:
        write_bytes(box.root / PICTURES, picture)
        files[PICTURES] = file_entry(box.root / PICTURES)
    result = {
        "evaluation": asked["evaluation"],
        "encoder": display_name(spec),
        "feature": "tokens",
        **found,
        "train_loss": history[-1]["loss"],
        "history": history,
        "settings": asked["settings"],
        "encoder_identity": asked["encoder"],
        "data": asked["data"],
        "fingerprint": box.fingerprint,
    }
    save_result(box, result, files)
    return result


def require_dense() -> None:
    """Raise SettingsError where the extra is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
        import segmentation_models_pytorch  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"segmentation and detection need {error.name}, which is not installed", fix="pip install 'cae2pipe[dense]'"
        ) from None
