"""Detection: (Cascade) Mask R-CNN, trained on COCO's format, scored by average precision (paper, Table 12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.config.dense import REFERENCE_BATCH, DetectSettings
from cae2pipe.dense.average_precision import Detection, average_precision
from cae2pipe.dense.box_crops import BoxChunk, ScoredReader
from cae2pipe.dense.coco import CocoImages
from cae2pipe.dense.coco_file import ImageEntry
from cae2pipe.dense.pyramid import Pyramid, decay_groups
from cae2pipe.dense.rcnn import MaskRCNN
from cae2pipe.dense.upernet import spread_norms
from cae2pipe.models.trainable import take_any_size
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.seeded import seeded
from cae2pipe.runtime.workers import in_order
from cae2pipe.runtime.world import World
from cae2pipe.supervised.learner import TunedLearner
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.schedule import Chunk, TrainSchedule
from cae2pipe.training.schedule import step_rate

SHOWN = 0.5
"""Minimum score of a detection in pictures."""

Drawn = tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Pixels (H, W, 3), and boxes (n, 4) with labels (n,) from 1: true and detected ones."""


class Detector(Normalised):
    """A detector with normalisation of its input."""

    def forward(self, images: Tensor, sizes: Any, targets: Any = None) -> Any:  # type: ignore[override]
        return self.model(images, sizes, targets)


def build_detector(backbone: Normalised, classes: int, settings: DetectSettings) -> Detector:
    """Heads on an encoder from ``prepared_encoder``, which is changed to accept images of any size."""
    take_any_size(backbone.model, max(settings.long_side, *settings.short_sides))
    with seeded("heads", settings.seed):
        model = MaskRCNN(Pyramid(backbone.model), classes, settings).to(backbone.normalise.shift.device)
    return Detector(model, backbone.normalise)


class DetectLearner(TunedLearner):
    """Trains a detector.

    Args:
        detector: from ``build_detector``. settings: all settings. schedule: the order of images. bf16: compute under
        autocast. world: the processes. val: images for scoring.

    Nothing is compiled, since images have too many sizes.
    """

    def __init__(
        self,
        detector: Detector,
        settings: DetectSettings,
        schedule: TrainSchedule,
        *,
        bf16: bool,
        world: World,
        val: CocoImages,
    ):
        self.settings, self.schedule, self.val = settings, schedule, val
        detector = spread_norms(detector, world.ranks, world.device)
        model = detector.model
        groups = decay_groups(model.pyramid, model, settings.weight_decay, layer_decay=settings.layer_decay)
        super().__init__(detector, groups, betas=(settings.beta1, settings.beta2), world=world, bf16=bf16)
        self.scores: dict[str, Any] | None = None

    def loss(self, chunk: Chunk) -> Tensor:
        assert isinstance(chunk, BoxChunk)
        chunk = chunk.to(self.world.device)
        images = self.network.normalise(chunk.pixels)
        with (
            seeded("chunk", self.settings.seed, chunk.step, chunk.number),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            losses = self.module(images, list(chunk.sizes), list(chunk.targets))
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def rate(self, step: int) -> float:
        return self.scaled_rate(step, 1.0)

    def scaled_rate(self, step: int, scale: float) -> float:
        settings, factor = self.settings, self.settings.batch / REFERENCE_BATCH
        lr, least = settings.lr * factor * scale, settings.min_lr * factor
        return step_rate(step, self.schedule.steps, settings.warmup_steps, lr=lr, min_lr=least, drops=settings.drops)

    def validates(self, epoch: int) -> bool:
        every, last = self.settings.validate_epochs, epoch + 1 == self.schedule.epochs
        return last or bool(every and (epoch + 1) % every == 0)

    def validate(self, epoch: int) -> dict[str, float]:
        self.scores = self.score()
        return {name: self.scores[name] for name in ("ap_box", "ap_mask")}

    def score(self) -> dict[str, Any]:
        """Scores over all val images, which are divided among the processes."""
        self.world.broadcast_buffers(self.network)
        own = range(self.world.rank, len(self.val), self.world.ranks)
        detections = [detection for parts in self.world.gather(self.detections(own)) for detection in parts]
        return average_precision(self.val.dataset, detections)

    def detections(self, own: range) -> list[Detection]:
        """Detections on the val images ``own``, in COCO's format."""
        reader = ScoredReader(self.val, own, self.settings, mean=self.network.normalise.mean)
        workers = min(worker_count(self.settings.speed.workers), len(reader))
        items = in_order(reader, workers, preload=[ScoredReader.__module__])
        return [
            detection
            for index, (pixels, size) in zip(own, items, strict=True)
            for detection in self.detect(self.val.images[index], pixels, size)
        ]

    @torch.no_grad()
    def detect(self, entry: ImageEntry, pixels: np.ndarray, size: tuple[int, int]) -> list[Detection]:
        """Detections on one image, in pixels of the original. Raises OutOfMemoryError."""
        from faster_coco_eval.core import mask
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        detector = self.network.eval()
        height, width = entry["height"], entry["width"]
        with self.scoring_advice():
            images = detector.normalise(torch.tensor(pixels, device=self.world.device)[None])
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                (output,) = detector(images, [size])
            scale = output["boxes"].new_tensor([width / size[1], height / size[0]] * 2)
            boxes = output["boxes"] * scale
            if not len(boxes):
                return []
            pasted = paste_masks_in_image(output["masks"][:, None], boxes, (height, width))[:, 0] >= 0.5
        encoded = mask.encode(np.asfortranarray(pasted.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
        corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        return [
            {
                "image_id": entry["id"],
                "category_id": label,
                "score": score,
                "bbox": box,
                "segmentation": segmentation,
            }
            for label, score, box, segmentation in zip(
                output["labels"].tolist(), output["scores"].tolist(), corners.tolist(), encoded, strict=True
            )
        ]


def drawn_detections(learner: DetectLearner, count: int) -> list[Drawn]:
    """Pixels, true and detected objects of the first ``count`` val images."""
    count = min(count, len(learner.val))
    by_image: dict[int, list[Detection]] = {}
    for detection in learner.detections(range(count)):
        if detection["score"] >= SHOWN:
            by_image.setdefault(detection["image_id"], []).append(detection)
    drawn = []
    for index in range(count):
        image, objects = learner.val.read(index)
        own = by_image.get(learner.val.images[index]["id"], [])
        corners = np.array([each["bbox"] for each in own], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = np.array([each["category_id"] for each in own], dtype=np.int64)
        drawn.append((np.asarray(image), (objects.boxes, objects.labels), (corners, labels)))
    return drawn
