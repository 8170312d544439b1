"""Stage 3 for segmentation and detection: train a decoder with the encoder, score it, write ``result.json`` and
pictures.

Read from top to bottom. Under torchrun every process runs all of this on its share of the images; the leading one
writes. Needs the extra ``dense``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cae2pipe.artifacts.artifact import ScoresArtifact
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.dense.box_crops import BoxReader
from cae2pipe.dense.coco import CocoImages, open_coco, told_left_out
from cae2pipe.dense.detect import DetectLearner, build_detector, drawn_detections
from cae2pipe.dense.label_crops import LabelCropReader
from cae2pipe.dense.label_maps import LabelledImages, open_label_maps
from cae2pipe.dense.segment import SegmentLearner, build_segmenter, drawn_predictions
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.backbone import prepared_encoder
from cae2pipe.evaluation.encoders import FrozenEncoder, display_name, load_encoder
from cae2pipe.evaluation.result_store import open_scores, save_result
from cae2pipe.evaluation.weights import save_weights
from cae2pipe.reporting.box_pictures import box_sheet
from cae2pipe.reporting.label_pictures import label_sheet
from cae2pipe.reporting.pictures import png_bytes
from cae2pipe.runtime.device import resolve_precision, set_backends
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import World, stage_world
from cae2pipe.supervised.loop import train
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.schedule import Reader, TrainSchedule, check_share, full_batches
from cae2pipe.training.compilation import compiles

LAST, PICTURES = "last.safetensors", "pictures.png"
REVISION = 2
"""Revision of both trainings. Folders of another are read, and neither resumed nor taken for the same score."""

Settings = TypeVar("Settings", SegmentSettings, DetectSettings)
Part = TypeVar("Part", LabelledImages, CocoImages)


@dataclass(frozen=True)
class DenseJob(Generic[Settings, Part]):
    """One evaluation in progress. ``train`` and ``val`` are its images for training and scoring."""

    encoder: FrozenEncoder
    spec: str
    settings: Settings
    bf16: bool
    train: Part
    val: Part
    root: Path
    world: World
    report: Report

    def trained(
        self, learner: SegmentLearner | DetectLearner, schedule: TrainSchedule, reading: Callable[[range, int], Reader]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Train; returns the scores and one line per epoch. ``reading`` makes the reader of some chunks of every step,
        from a step on."""
        own = schedule.own(self.world.rank, self.world.ranks)
        history = train(
            learner,
            schedule,
            lambda start: reading(own, start),
            root=self.root,
            settings=self.settings,
            world=self.world,
            report=self.report,
        )
        # A run that was killed after its last step has no scores yet.
        self.report.phase("scoring")
        return learner.scores or learner.score(), history


@dataclass(frozen=True)
class DenseScored:
    """The outcome of an evaluation: the trained network, the entries of its result, its history and its pictures."""

    network: Normalised
    figures: dict[str, Any]
    history: list[dict[str, Any]]
    picture: bytes | None


def segment(spec: str, data: Path, out: Path, *, settings: SegmentSettings, report: Report) -> dict[str, Any]:
    """Train UperNet on the encoder ``spec`` with label maps, and score it, into ``out``/segment.

    Args:
        data: a folder with images/{train,val} and annotations/{train,val}, and the names of its classes.

    Returns:
        The content of ``result.json``; {} in all but the leading process.

    Raises:
        SourceError, SettingsError, ManifestError, TeacherError, MismatchError, DamageError, DivergedError,
        OutOfMemoryError: see their messages.
    """

    def opened() -> tuple[LabelledImages, LabelledImages, dict[str, Any], list[str]]:
        train_part, val_part = open_label_maps(data, settings)
        return train_part, val_part, {"classes": train_part.classes}, [*train_part.notes, *val_part.notes]

    return perform(
        "segment",
        spec,
        out,
        settings=settings,
        opened=opened,
        work=train_segmenter,
        headline=("mIoU", "miou"),
        fixed_shapes=True,
        report=report,
    )


def detect(spec: str, data: Path, out: Path, *, settings: DetectSettings, report: Report) -> dict[str, Any]:
    """Train Mask R-CNN or Cascade Mask R-CNN on the encoder ``spec`` with data in COCO's format, and score it, into
    ``out``/detect.

    Args:
        data: a folder with train2017, val2017 and annotations/instances_{train2017,val2017}.json.

    Returns, raises: as ``segment``.
    """

    def opened() -> tuple[CocoImages, CocoImages, dict[str, Any], list[str]]:
        parts = open_coco(data, settings.upright)
        names = ("train", "val")
        lines = [told_left_out(name, part.left_out) for name, part in zip(names, parts, strict=True)]
        return *parts, {}, [line for each in lines for line in each]

    return perform(
        "detect",
        spec,
        out,
        settings=settings,
        opened=opened,
        work=train_detector,
        headline=("AP^b", "ap_box"),
        fixed_shapes=False,  # images have many sizes, and benchmarking algorithms for each would take too long
        report=report,
    )


def perform(
    kind: str,
    spec: str,
    out: Path,
    *,
    settings: Settings,
    opened: Callable[[], tuple[Part, Part, dict[str, Any], list[str]]],
    work: Callable[[DenseJob[Settings, Part]], DenseScored | None],
    headline: tuple[str, str],
    fixed_shapes: bool,
    report: Report,
) -> dict[str, Any]:
    """Train and score, or return the existing result.

    Args:
        opened: opens the data for training and scoring; also returns what else identifies them, and lines to log.
        work: trains and scores; returns None in all but the leading process.
        headline: the main score's name in the log, and its key in the result.
    """
    require_dense()
    with stage_world(settings.speed.device, report) as (world, report), ExitStack() as stack:
        precision = resolve_precision(settings.precision, world.device)
        set_backends(precision == "bf16", fixed_shapes=fixed_shapes)
        report.phase("opening the images")
        train_part, val_part, more, notes = world.main_first(opened)
        report.phase("loading the encoder")
        encoder = world.main_first(lambda: load_encoder(spec, settings.seed, world.device))
        world.run_on_main(lambda: stack.enter_context(writing(out)))
        root = out / kind
        asked = {
            "evaluation": kind,
            "revision": REVISION,
            "settings": fingerprinted(settings) | {"precision": precision},
            "encoder": encoder.identity,
            "data": {"train": train_part.identity, "val": val_part.identity, **more},
        }
        artifact, result = world.run_on_main(lambda: open_scores(root, asked, type(settings)))
        if result:
            report.log(f"nothing to do: {root} already has this score, {headline[0]} {result[headline[1]]:.4f}")
            return result if world.is_main else {}
        for note in notes:
            report.log(note)
        check_share(settings.batch // settings.chunk, world.ranks)
        score = work(
            DenseJob(
                encoder=encoder,
                spec=spec,
                settings=settings,
                bf16=precision == "bf16",
                train=train_part,
                val=val_part,
                root=root,
                world=world,
                report=report,
            )
        )
        return write_dense_scores(artifact, spec, score) if score else {}


def train_segmenter(job: DenseJob[SegmentSettings, LabelledImages]) -> DenseScored | None:
    settings, classes = job.settings, job.train.classes
    schedule = full_batches(
        len(job.train), settings.batch, settings.chunk, epochs=1, seed=settings.seed, length=settings.steps
    )
    backbone = prepared_encoder(
        job.encoder,
        job.spec,
        image_size=settings.image_size,
        layer_scale=settings.layer_scale,
        drop_path=settings.drop_path,
        relative_positions=settings.relative_positions,
    )
    segmenter = build_segmenter(backbone, len(classes), settings)
    compiled = compiles(settings.speed.compile, job.world.device)
    learner = SegmentLearner(
        segmenter, settings, schedule, bf16=job.bf16, compiled=compiled, world=job.world, val=job.val
    )
    mean = segmenter.normalise.mean
    scores, history = job.trained(
        learner,
        schedule,
        lambda own, start: LabelCropReader(job.train, schedule, own, start=start, settings=settings, mean=mean),
    )
    if not job.world.is_main:
        return None
    sheet = label_sheet(drawn_predictions(learner, job.val, settings.pictures), len(job.val.classes))
    protocol = (
        f"UperNet, AdamW, lr {settings.lr:g} x batch / 16, layer decay {settings.layer_decay:g}, batch "
        f"{settings.batch}, {settings.steps} steps, windows of {settings.image_size} every {settings.stride}, one scale"
    )
    counts = {"train": len(job.train), "val": len(job.val)}
    figures = {**scores, "protocol": protocol, "classes": len(classes), "images": counts}
    return DenseScored(segmenter, figures, history, picture=None if sheet is None else png_bytes(sheet))


def train_detector(job: DenseJob[DetectSettings, CocoImages]) -> DenseScored | None:
    settings, classes = job.settings, job.train.classes
    schedule = full_batches(len(job.train), settings.batch, settings.chunk, epochs=settings.epochs, seed=settings.seed)
    backbone = prepared_encoder(
        job.encoder,
        job.spec,
        image_size=None,
        layer_scale=settings.layer_scale,
        drop_path=settings.drop_path,
        relative_positions=False,
    )
    detector = build_detector(backbone, len(classes), settings)
    learner = DetectLearner(detector, settings, schedule, bf16=job.bf16, world=job.world, val=job.val)
    mean = detector.normalise.mean
    scores, history = job.trained(
        learner,
        schedule,
        lambda own, start: BoxReader(job.train, schedule, own, start=start, settings=settings, mean=mean),
    )
    if not job.world.is_main:
        return None
    picture = box_sheet(drawn_detections(learner, settings.pictures), job.val.classes)
    name = "Cascade Mask R-CNN" if settings.cascade else "Mask R-CNN"
    protocol = (
        f"{name}, AdamW, lr {settings.lr:g} x batch / 16, layer decay {settings.layer_decay:g}, batch "
        f"{settings.batch}, {settings.epochs} epochs, short side {max(settings.short_sides)}, one scale"
    )
    figures = {
        **scores,
        "protocol": protocol,
        "classes": len(classes),
        "images": {"train": len(job.train), "val": len(job.val)},
        "left_out": {"train": job.train.left_out, "val": job.val.left_out},
    }
    return DenseScored(detector, figures, history, picture=picture)


def write_dense_scores(artifact: ScoresArtifact, spec: str, score: DenseScored) -> dict[str, Any]:
    """Write weights, pictures and result, and mark the artifact complete."""
    save_weights(score.network.model, artifact.root / LAST)
    files = {LAST: file_entry(artifact.root / LAST)}
    if score.picture is not None:
        write_bytes(artifact.root / PICTURES, score.picture)
        files[PICTURES] = file_entry(artifact.root / PICTURES)
    figures = {
        "feature": "tokens",
        **score.figures,
        "train_loss": score.history[-1]["loss"],
        "history": score.history,
    }
    return save_result(artifact, display_name(spec), figures, files)


def require_dense() -> None:
    """Raise SettingsError if the extra is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
        import segmentation_models_pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"segmentation and detection need {error.name}, which is not installed", fix="pip install 'cae2pipe[dense]'"
        ) from None
