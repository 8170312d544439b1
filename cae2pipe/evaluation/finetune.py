"""Fine-tuning: the whole encoder trained as a classifier (paper, Table 10)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.config.evaluate import FinetuneSettings
from cae2pipe.evaluation.backbone import prepared_encoder
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.evaluation.predict import SplitPredictions
from cae2pipe.evaluation.scores import accuracy
from cae2pipe.evaluation.weights import save_weights
from cae2pipe.models.trainable import layer_decay_groups, set_classifier
from cae2pipe.runtime.device import exact_float32
from cae2pipe.runtime.seeded import seeded
from cae2pipe.runtime.world import World
from cae2pipe.supervised.learner import TunedLearner
from cae2pipe.supervised.normalised import Normalised
from cae2pipe.supervised.schedule import Chunk, TrainSchedule
from cae2pipe.training.compilation import compile_in_place
from cae2pipe.training.schedule import learning_rate

REFERENCE_BATCH = 1024
"""The batch size that learning rates refer to."""

BEST, LAST = "best.safetensors", "last.safetensors"


def build_classifier(encoder: FrozenEncoder, classes: int, settings: FinetuneSettings, *, spec: str) -> Normalised:
    """The encoder as a classifier that can be trained. Raises SettingsError as ``prepared_encoder``."""
    classifier = prepared_encoder(
        encoder,
        spec,
        image_size=settings.image_size,
        layer_scale=settings.layer_scale,
        drop_path=settings.drop_path,
        relative_positions=settings.relative_positions,
    )
    with seeded("classifier", settings.seed):
        set_classifier(classifier.model, classes, settings.head_scale)
    return classifier


class FinetuneLearner(TunedLearner):
    """Trains a classifier.

    Args:
        classifier: from ``build_classifier``. classes: number of classes. settings: all settings.
        schedule: the order of images. bf16: compute under autocast. compiled: use torch.compile. world: the processes.
        predict: from a function from pixels to logits to predictions for the val images.
        root: the folder for the best weights.
    """

    def __init__(
        self,
        classifier: Normalised,
        classes: int,
        settings: FinetuneSettings,
        *,
        schedule: TrainSchedule,
        bf16: bool,
        compiled: bool,
        world: World,
        predict: Callable[[Callable[[Tensor], Tensor]], SplitPredictions],
        root: Path,
    ):
        from timm.data.random_erasing import RandomErasing

        self.settings, self.schedule, self.predict, self.root = settings, schedule, predict, root
        self.erase = RandomErasing(settings.erase, mode="pixel", device=world.device)
        self.mix = make_mixup(settings, classes)
        groups = layer_decay_groups(classifier.model, settings.weight_decay, settings.layer_decay)
        self.average = averaged(classifier, settings.ema)
        if compiled:
            compile_in_place([classifier])
        betas = settings.beta1, settings.beta2
        super().__init__(classifier, groups, betas=betas, world=world, bf16=bf16, clip=settings.clip)
        self.best = -1.0
        self.predicted: SplitPredictions | None = None

    def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
        total = super().step(chunks, step, size)
        if self.average:
            self.average.update_parameters(self.network)
        return total

    def loss(self, chunk: Chunk) -> Tensor:
        images = self.network.normalise(chunk.pixels.to(self.world.device))
        labels = chunk.labels.to(self.world.device)
        with seeded("chunk", self.settings.seed, chunk.step, chunk.number):
            self.erase(images)
            targets = labels
            if self.mix:
                images, targets = self.mix(images, labels)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.module(images)
        # Mixup has smoothed these targets already.
        smoothing = 0.0 if self.mix else self.settings.smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def rate(self, step: int) -> float:
        factor = self.settings.batch / REFERENCE_BATCH
        lr, least = self.settings.lr * factor, self.settings.min_lr * factor
        return learning_rate(
            step,
            self.schedule.steps,
            self.schedule.epochs,
            warmup_epochs=self.settings.warmup_epochs,
            lr=lr,
            min_lr=least,
        )

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of a batch for scores, not compiled: batches have other sizes than in training."""
        scored: Any = self.average.module if self.average else self.network
        scored.eval()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = scored.model.forward_features(scored.normalise(pixels))
        with exact_float32(pixels.device):
            logits: Tensor = scored.model.forward_head(tokens.float())
        return logits

    def validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.settings.validate_epochs == 0 or epoch + 1 == self.schedule.epochs

    def validate(self, epoch: int) -> dict[str, float]:
        self.predicted = self.predict(self.logits)
        figures = accuracy(self.predicted.predictions)
        if figures["top1"] > self.best:
            self.best = figures["top1"]
            self.save(BEST)
        if epoch + 1 == self.schedule.epochs:
            self.save(LAST)
        return figures

    def save(self, name: str) -> None:
        """Save the weights that are scored, under timm's names."""
        if self.world.is_main:
            scored: Any = self.average.module if self.average else self.network
            save_weights(scored.model, self.root / name)

    def state(self) -> dict[str, Any]:
        average = self.average.state_dict() if self.average else None
        return {**super().state(), "average": average, "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.average:
            self.average.load_state_dict(state["average"])
        self.best = state["best"]


def make_mixup(settings: FinetuneSettings, classes: int) -> Any:
    """timm's Mixup and CutMix, which also smooth the labels; None if neither is enabled."""
    from timm.data import Mixup

    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)


def averaged(classifier: Normalised, decay: float) -> Any:
    """An exponential moving average of the weights, or None."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
