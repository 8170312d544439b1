"""Segmentation: UperNet trained on label maps, scored with a sliding window (paper, Table 11)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cae2pipe.config.dense import REFERENCE_BATCH, SegmentSettings
from cae2pipe.dense.iou import pixel_confusion, segmentation_scores
from cae2pipe.dense.label_crops import fitted_size
from cae2pipe.dense.label_maps import LabelledImages
from cae2pipe.dense.pyramid import Pyramid, decay_groups
from cae2pipe.dense.sliding import sliding_logits
from cae2pipe.dense.upernet import UperNet, resized, segmentation_loss, spread_norms
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.seeded import seeded
from cae2pipe.runtime.workers import in_order
from cae2pipe.runtime.world import World
from cae2pipe.supervised.learner import TunedLearner
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.schedule import Chunk, TrainSchedule
from cae2pipe.training.compilation import compile_in_place
from cae2pipe.training.schedule import polynomial_rate


def build_segmenter(backbone: Normalised, classes: int, settings: SegmentSettings) -> Normalised:
    """UperNet on an encoder from ``prepared_encoder``; both normalise their input in the same way."""
    with seeded("decoder", settings.seed):
        pyramid = Pyramid(backbone.model)
        width = settings.decoder_width or pyramid.width
        model = UperNet(pyramid, classes, width, dropout=settings.dropout, auxiliary=settings.auxiliary > 0)
    backbone.model = model.to(backbone.normalise.shift.device)
    return backbone


class SegmentLearner(TunedLearner):
    """Trains a segmenter.

    Args:
        segmenter: from ``build_segmenter``. settings: all settings. schedule: the order of images. bf16: compute under
        autocast. compiled: use torch.compile. world: the processes. val: images for scoring.
    """

    def __init__(
        self,
        segmenter: Normalised,
        settings: SegmentSettings,
        schedule: TrainSchedule,
        *,
        bf16: bool,
        compiled: bool,
        world: World,
        val: LabelledImages,
    ):
        self.settings, self.schedule, self.val = settings, schedule, val
        segmenter = spread_norms(segmenter, world.ranks, world.device)
        model = segmenter.model
        groups = decay_groups(model.pyramid, model, settings.weight_decay, layer_decay=settings.layer_decay)
        if compiled:
            compile_in_place([model.pyramid])
        super().__init__(segmenter, groups, betas=(settings.beta1, settings.beta2), world=world, bf16=bf16)
        self.scores: dict[str, Any] | None = None

    def loss(self, chunk: Chunk) -> Tensor:
        images = self.network.normalise(chunk.pixels.to(self.world.device))
        labels = chunk.labels.to(self.world.device)
        with (
            seeded("chunk", self.settings.seed, chunk.step, chunk.number),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            outputs = self.module(images)
        return segmentation_loss(outputs, labels, self.settings.auxiliary)

    def rate(self, step: int) -> float:
        settings, factor = self.settings, self.settings.batch / REFERENCE_BATCH
        lr, least = settings.lr * factor, settings.min_lr * factor
        return polynomial_rate(
            step, self.schedule.total, settings.warmup_steps, lr=lr, min_lr=least, power=settings.power
        )

    def validates(self, epoch: int) -> bool:
        every, last = self.settings.validate_epochs, (epoch + 1) * self.schedule.steps >= self.schedule.total
        return last or bool(every and (epoch + 1) % every == 0)

    def validate(self, epoch: int) -> dict[str, float]:
        self.scores = self.score()
        return {name: self.scores[name] for name in ("miou", "pixel_accuracy", "mean_accuracy")}

    def score(self) -> dict[str, Any]:
        """Scores over all val images, which are divided among the processes."""
        self.world.broadcast_buffers(self.network)
        classes = len(self.val.classes)
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.world.device)
        own = range(self.world.rank, len(self.val), self.world.ranks)
        reader = ScaledReader(self.val, own, self.settings.scale)
        workers = min(worker_count(self.settings.speed.workers), len(reader))
        for pixels, labels in in_order(reader, workers, preload=[__name__]):
            predicted = self.predict(pixels, labels.shape)
            confusion += pixel_confusion(predicted, torch.from_numpy(labels).to(predicted.device), classes)
        return segmentation_scores(self.world.sum(confusion), self.val.classes)

    @torch.no_grad()
    def predict(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Labels int64 of ``size`` for an already scaled image, uint8 (h, w, 3). Raises OutOfMemoryError."""
        model = self.network.eval()
        device = self.world.device
        side, stride = self.settings.image_size, self.settings.stride

        def logits(windows: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                output: Tensor = model(windows)[0]
            return output

        with self.scoring_advice():
            # The numpy array may be in read-only memory.
            image = model.normalise(torch.tensor(pixels, device=device).permute(2, 0, 1)[None])[0]
            fill = torch.zeros(3, device=device)
            scored = sliding_logits(logits, image, side, stride=stride, batch=self.settings.chunk, fill=fill)
            return resized(scored[None], size)[0].argmax(dim=0)


class ScaledReader:
    """Val images at the size for scoring, uint8 (h, w, 3), with labels at original size; picklable."""

    def __init__(self, data: LabelledImages, own: range, scale: tuple[int, int]):
        self.data, self.own, self.scale = data, own, scale

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self.data.read(self.own[index])
        return np.asarray(image.resize(fitted_size(*image.size, self.scale), Image.Resampling.BILINEAR)), labels


def drawn_predictions(
    learner: SegmentLearner, data: LabelledImages, count: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels (H, W, 3), true and predicted labels (H, W) of the first ``count`` images."""
    drawn = []
    for index in range(min(count, len(data))):
        image, labels = data.read(index)
        scaled = np.asarray(image.resize(fitted_size(*image.size, learner.settings.scale), Image.Resampling.BILINEAR))
        drawn.append((np.asarray(image), labels, learner.predict(scaled, labels.shape).cpu().numpy().astype(np.uint8)))
    return drawn
