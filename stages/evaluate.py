"""Stage 3: score an encoder on labelled images.

Read from top to bottom: open the data, load the encoder, score it, write ``result.json`` and predictions. Under
torchrun every process runs all of this on its share of the images; the leading one writes. There are two kinds of
scores: on features that are computed once and cached (knn, linear with cached crops), and by training on new crops of
every image in every epoch (linear, attentive, finetune).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import ScoresArtifact
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.evaluate import AnySettings, AttentiveSettings, FinetuneSettings, KnnSettings, LinearSettings
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.attentive import AttentiveProbe, head_count
from cae2pipe.evaluation.chunk_reader import ChunkReader
from cae2pipe.evaluation.crop_batches import batch_for
from cae2pipe.evaluation.crops import CentralCrop, Crop, DrawnCrop
from cae2pipe.evaluation.datasets import Split, common_labels, open_data
from cae2pipe.evaluation.encoders import FrozenEncoder, display_name, load_encoder
from cae2pipe.evaluation.features import FeatureSet, extract_features, log_rejects, resolve_feature, resolve_size
from cae2pipe.evaluation.finetune import BEST, LAST, FinetuneLearner, build_classifier
from cae2pipe.evaluation.knn import knn_predictions
from cae2pipe.evaluation.linear import Probe, batch_and_steps, lars, lars_groups, logits, train_probe
from cae2pipe.evaluation.predict import SplitPredictions, predict
from cae2pipe.evaluation.probe_learner import Inputs, ProbeLearner, all_tokens, pooled
from cae2pipe.evaluation.protocols import protocol
from cae2pipe.evaluation.result_store import open_scores, save_result
from cae2pipe.evaluation.scores import Predictions, accuracy, from_scores, per_class, write_predictions
from cae2pipe.runtime.device import resolve_precision, set_backends
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.seeded import seeded
from cae2pipe.runtime.world import World, stage_world
from cae2pipe.supervised.loop import Learner, train
from cae2pipe.supervised.remedies import Trained, cpu_remedy
from cae2pipe.supervised.schedule import TrainSchedule, all_images, check_share, full_batches
from cae2pipe.training.compilation import compiles

ATTENTIVE_REVISION = 2
"""Of the attentive probe's training. Before, 1, it began from other weights."""


@dataclass(frozen=True)
class Job:
    """The inputs of one evaluation of any kind. ``root`` is its own folder, ``shared`` the one above. Scores are taken
    on ``feature`` of inputs of ``size`` pixels."""

    encoder: FrozenEncoder
    spec: str
    feature: str
    size: int
    train: Split
    val: Split
    shared: Path
    root: Path
    world: World
    report: Report

    @property
    def classes(self) -> list[str]:
        return self.train.classes


@dataclass(frozen=True)
class Scored:
    """The outcome of an evaluation: ``val`` are the predictions for the val images; ``trained`` and ``left_out`` count
    training images; ``files`` are in its folder."""

    val: SplitPredictions
    figures: dict[str, Any]
    trained: int
    left_out: int = 0
    files: tuple[str, ...] = ()


def evaluate(kind: str, spec: str, data: Path, *, out: Path, settings: AnySettings, report: Report) -> dict[str, Any]:
    """Score the encoder ``spec`` on ``data``, a folder with train and val, into ``out``/``kind``.

    Returns:
        The content of ``result.json``; ``top1`` and ``top5`` are the accuracies. {} in all but the leading process.

    Raises:
        SourceError, SettingsError, ManifestError, TeacherError, MismatchError, DamageError, DivergedError,
        OutOfMemoryError: see their messages.
    """
    with stage_world(settings.speed.device, report) as (world, report), ExitStack() as stack:
        precision = precision_of(settings, world.device)
        # TF32 is only for training networks; neighbours and frozen features are compared in float32.
        tuned = isinstance(settings, FinetuneSettings)
        set_backends(tuned and precision == "bf16", fixed_shapes=tuned)
        batch = batch_for(settings.speed.batch, world.device)
        report.phase("opening the images")
        train_split, val_split = world.main_first(lambda: open_data(data, batch))
        for split in (train_split, val_split):
            for remark in split.remarks:
                report.log(f"{split.root}: {remark}")
        report.phase("loading the encoder")
        encoder = world.main_first(lambda: load_encoder(spec, settings.seed, world.device, precision=precision))
        resolved = fingerprinted(settings)
        if isinstance(settings, FinetuneSettings):
            size, feature = settings.image_size or encoder.image_size, "mean"
            resolved |= {"precision": precision}
        else:
            size, feature = resolve_size(settings.features, encoder), resolve_feature(settings.features, encoder)
        if isinstance(settings, AttentiveSettings):
            resolved |= {"heads": settings.heads or encoder.heads}
        if isinstance(settings, LinearSettings) and settings.cached_crops == 1:
            # Nothing is drawn, so scores of earlier versions remain the same ones.
            resolved["draw"].pop("clip", None)
        root = out / kind
        asked = {
            "evaluation": kind,
            "settings": resolved,
            "encoder": encoder.identity,
            "feature": "tokens" if kind == "attentive" else feature,
            "image_size": size,
            "data": {"train": train_split.identity, "val": val_split.identity},
        }
        if isinstance(settings, AttentiveSettings):
            asked["revision"] = ATTENTIVE_REVISION
        world.run_on_main(lambda: stack.enter_context(writing(out)))
        artifact, result = world.run_on_main(lambda: open_scores(root, asked, type(settings)))
        if result:
            report.log(f"nothing to do: {root} already has this score, top1 {result['top1']:.4f}")
            return result if world.is_main else {}
        job = Job(
            encoder=encoder,
            spec=spec,
            feature=feature,
            size=size,
            train=train_split,
            val=val_split,
            shared=out,
            root=root,
            world=world,
            report=report,
        )
        # Only the leading process scores cached features.
        score = SCORES[kind](job, settings)
        if score is None or not world.is_main:
            return {}
        return write_scores(artifact, job, settings, score=score)


def write_scores(artifact: ScoresArtifact, job: Job, settings: AnySettings, *, score: Scored) -> dict[str, Any]:
    """Write the result, and mark the evaluation complete."""
    predictions = score.val.predictions
    log_rejects(job.val, score.val.rejected, job.report)
    figures = {
        "feature": artifact.identity["feature"],
        **accuracy(predictions),
        **score.figures,
        "protocol": protocol(settings, job.size),
        "classes": len(job.classes),
        "images": {"train": score.trained, "val": len(predictions.labels)},
        "rejected": {"train": score.left_out, "val": len(score.val.rejected)},
        "per_class": per_class(predictions, job.classes),
    }
    files = write_predictions(job.root, predictions, job.classes)
    files |= {name: file_entry(job.root / name) for name in score.files}
    return save_result(artifact, display_name(job.spec), figures, files)


def score_knn(job: Job, settings: KnnSettings) -> Scored | None:
    """Weighted nearest neighbours of the val images among the train images. ``by_feature`` has the scores of every k
    for class token and mean patch token; the main score is that of the first k."""
    central = CentralCrop(job.size, round(job.size / settings.features.crop))
    sets = features_of(job, settings, [central])
    if sets is None:
        return None
    (train_set,), val_set = sets
    job.report.phase("finding nearest neighbours")
    numbers = neighbours(settings, len(train_set.labels), job.report)
    device = job.world.device
    labels = common_labels(val_set.labels, job.val.classes, job.classes).numpy()

    def predictions(kind: str) -> dict[int, Predictions]:
        nearest = knn_predictions(
            train_set.features[kind].to(device),
            train_set.labels.to(device),
            val_set.features[kind].to(device),
            classes=len(job.classes),
            k=numbers,
            temperature=settings.temperature,
        )
        return {
            k: Predictions(best.numpy(), share.numpy(), labels=labels, keys=val_set.keys)
            for k, (best, share) in nearest.items()
        }

    with frozen_advice(job, settings, len(train_set.labels)):
        by_feature = {kind: predictions(kind) for kind in train_set.features}
    figures = {
        kind: {str(k): accuracy(predicted) for k, predicted in each.items()} for kind, each in by_feature.items()
    }
    headline = SplitPredictions(by_feature[job.feature][numbers[0]], val_set.rejected)
    more = {"k": numbers[0], "by_feature": figures}
    return Scored(headline, more, trained=len(train_set.labels), left_out=len(train_set.rejected))


def score_linear(job: Job, settings: LinearSettings) -> Scored | None:
    """A linear classifier (paper, Table 9) on features of cached crops, or on new crops in every epoch."""
    if settings.cached_crops:
        return score_cached_linear(job, settings)
    inputs = pooled(job.feature)
    dim = measure(job, inputs)[-1]
    with seeded("probe", settings.seed):
        head = Probe(dim, len(job.classes)).to(job.world.device)
    batch, _ = batch_and_steps(job.train.images, settings.batch)
    groups = lars_groups(head, settings.lr, settings.batch, taken=batch)
    return train_head(job, settings, head, inputs=inputs, optimizer=lars(groups, settings.momentum))


def score_cached_linear(job: Job, settings: LinearSettings) -> Scored | None:
    central = CentralCrop(job.size, round(job.size / settings.features.crop))
    drawn = [
        DrawnCrop(job.size, settings.draw, (0.5, 0.5, 0.5), seed=settings.seed, epoch=number)
        for number in range(1, settings.cached_crops)
    ]
    sets = features_of(job, settings, [central, *drawn])
    if sets is None:
        return None
    train_sets, val_set = sets
    device = job.world.device
    val_labels = common_labels(val_set.labels, job.val.classes, job.classes)
    labels = train_sets[0].labels
    with frozen_advice(job, settings, len(labels) * len(train_sets)):
        crops = [each.features[job.feature].to(device) for each in train_sets]
        probe, figures = train_probe(
            crops, labels.to(device), classes=len(job.classes), settings=settings, report=job.report
        )
        scores = logits(probe, val_set.features[job.feature].to(device))
        predicted = SplitPredictions(from_scores(scores, val_labels, val_set.keys), val_set.rejected)
    return Scored(predicted, figures, trained=len(labels), left_out=len(train_sets[0].rejected))


def score_attentive(job: Job, settings: AttentiveSettings) -> Scored | None:
    """One cross-attention block with a learned query, and a linear classifier."""
    dim = measure(job, all_tokens)[-1]
    with seeded("probe", settings.seed):
        heads = head_count(dim, settings.heads or job.encoder.heads)
        head = AttentiveProbe(dim, len(job.classes), heads, eps=settings.eps).to(job.world.device)
    batch, _ = batch_and_steps(job.train.images, settings.batch)
    groups = [{"params": list(head.parameters()), "peak": settings.lr * batch / 8192}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=True)
    return train_head(job, settings, head, inputs=all_tokens, optimizer=optimizer)


def train_head(
    job: Job,
    settings: LinearSettings | AttentiveSettings,
    head: Probe | AttentiveProbe,
    *,
    inputs: Inputs,
    optimizer: torch.optim.Optimizer,
) -> Scored:
    """Train a head on new crops of every image in every epoch, and score it."""
    batch, steps = batch_and_steps(job.train.images, settings.batch)
    schedule = all_images(
        job.train.images, batch, steps, chunk=settings.chunk, epochs=settings.epochs, seed=settings.seed
    )
    learner = ProbeLearner(
        job.encoder,
        head,
        inputs,
        optimizer=optimizer,
        schedule=schedule,
        warmup_epochs=settings.warmup_epochs,
        batch=job.train.batch,
        world=job.world,
    )
    crop = DrawnCrop(job.size, settings.draw, (0.5, 0.5, 0.5), seed=settings.seed)
    history = trained(job, settings, learner, schedule=schedule, crop=crop)
    central = CentralCrop(job.size, round(job.size / settings.features.crop))
    job.report.phase("scoring the val images")
    val = predict(learner.logits, job.val, job.classes, crop=central, workers=settings.speed.workers, world=job.world)
    losses = [line["loss"] for line in history]
    figures = {"lr": settings.lr, "train_loss": losses[-1], "losses": losses}
    return Scored(val, figures, job.train.images)


def score_finetune(job: Job, settings: FinetuneSettings) -> Scored:
    """The whole encoder trained as a classifier (paper, Table 10). The main score is that of the last epoch; ``best``
    is that of the best epoch, selected on the val images."""
    world, classes = job.world, job.classes
    check_share(settings.batch // settings.chunk, world.ranks)
    schedule = full_batches(
        job.train.images, settings.batch, settings.chunk, epochs=settings.epochs, seed=settings.seed
    )
    classifier = build_classifier(job.encoder, len(classes), settings, spec=job.spec)
    central = CentralCrop(job.size, round(job.size / settings.crop))

    def predicted(scores: Callable[[Tensor], Tensor]) -> SplitPredictions:
        return predict(scores, job.val, classes, crop=central, workers=settings.speed.workers, world=world)

    learner = FinetuneLearner(
        classifier,
        len(classes),
        settings,
        schedule=schedule,
        bf16=precision_of(settings, world.device) == "bf16",
        compiled=compiles(settings.speed.compile, world.device),
        world=world,
        predict=predicted,
        root=job.root,
    )
    crop = DrawnCrop(job.size, settings.draw, classifier.normalise.mean, seed=settings.seed)
    history = trained(job, settings, learner, schedule=schedule, crop=crop)
    # A run that was killed after its last step has no predictions yet.
    last = learner.predicted or predicted(learner.logits)
    best = max((line for line in history if "top1" in line), key=lambda line: line["top1"])
    figures = {
        "best": {name: best[name] for name in ("epoch", "top1", "top5")},
        "train_loss": history[-1]["loss"],
        "history": history,
    }
    return Scored(last, figures, job.train.images, files=(BEST, LAST))


SCORES: dict[str, Callable[[Job, Any], Scored | None]] = {
    "knn": score_knn,
    "linear": score_linear,
    "attentive": score_attentive,
    "finetune": score_finetune,
}
"""Evaluations by name."""


def features_of(
    job: Job, settings: KnnSettings | LinearSettings, crops: list[Crop]
) -> tuple[list[FeatureSet], FeatureSet] | None:
    """Features of all crops of the train images and of the first crop of the val images, on the CPU; None in all but
    the leading process."""

    def features(split: Split, crop: Crop) -> FeatureSet | None:
        return extract_features(
            job.shared / "features",
            job.encoder,
            split,
            crop=crop,
            workers=settings.speed.workers,
            world=job.world,
            report=job.report,
        )

    train_sets = [features(job.train, crop) for crop in crops]
    val_set = features(job.val, crops[0])
    own = [features for features in train_sets if features is not None]
    return (own, val_set) if val_set is not None else None


def frozen_advice(job: Job, settings: KnnSettings | LinearSettings, count: int) -> AbstractContextManager[None]:
    """Around work on ``count`` features at once: if they do not fit the device, advise to use the CPU."""
    precision = precision_of(settings, job.world.device)
    fix = cpu_remedy(f"features.precision={precision}", f"speed.batch={job.train.batch}")
    return memory_advice(f"a set of {count} features", f"{fix} uses the same features", job.train.root)


def trained(
    job: Job, settings: Trained, learner: Learner, *, schedule: TrainSchedule, crop: DrawnCrop
) -> list[dict[str, Any]]:
    """Train on this process's crops; returns one line per epoch."""
    own = schedule.own(job.world.rank, job.world.ranks)
    return train(
        learner,
        schedule,
        lambda start: ChunkReader(job.train, schedule, own, start=start, crop=crop),
        root=job.root,
        settings=settings,
        world=job.world,
        report=job.report,
    )


def measure(job: Job, inputs: Inputs) -> tuple[int, ...]:
    """The shape of a head's input for one image."""
    black = torch.zeros((1, 3, job.size, job.size), dtype=torch.uint8, device=job.world.device)
    return tuple(inputs(job.encoder, black).shape)


def neighbours(settings: KnnSettings, images: int, report: Report) -> tuple[int, ...]:
    """The values of k that are at most the number of training images; the log names the others.

    Raises:
        SettingsError: the first k, which gives the main score, is too large.
    """
    fitting = tuple(k for k in settings.k if k <= images)
    if settings.k[0] > images:
        raise SettingsError(
            f"k is {settings.k[0]}, but there are only {images} training images",
            where="k",
            fix=f"--set 'k={list(fitting) or [max(1, images // 2)]}'",
        )
    if len(fitting) < len(settings.k):
        report.log(
            f"ignored k above the number of training images ({images}): {sorted(set(settings.k) - set(fitting))}"
        )
    return fitting


def precision_of(settings: AnySettings, device: torch.device) -> str:
    asked = settings.precision if isinstance(settings, FinetuneSettings) else settings.features.precision
    return resolve_precision(asked, device)
