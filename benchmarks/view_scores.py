"""Scores of the checkpoints of a run, for benchmarks/views.py.

Images are decoded once, and their crops are kept in memory for all checkpoints of all runs: about 150 MB for 3,800
images at 112 pixels. The evaluations are those of cae2pipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import FAST_RATES, KnnSettings, LinearSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.evaluation.crop_batches import CPU_BATCH
from cae2pipe.evaluation.encoders import FrozenEncoder, Student, build_vit, class_token_trained
from cae2pipe.evaluation.knn import knn_predictions
from cae2pipe.evaluation.labelled_crops import Labelled, LabelledCrops, feature_of, in_order_of_runs
from cae2pipe.evaluation.linear import logits, train_probe
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import load_batches
from cae2pipe.methods.method import Method
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import timm_config, timm_state
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.remembered import Memory
from cae2pipe.runtime.world import World
from cae2pipe.targets.paths import LATENTS_FOLDER, VIEWS_FOLDER
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.checkpoint import checkpoints, read_checkpoint, step_of
from cae2pipe.training.held_out import held_out_plan, summed_terms
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.objective import make_objective
from cae2pipe.training.step import cached
from cae2pipe.training.target_spec import target_spec

CPU = torch.device("cpu")


class Labels:
    """Scores encoders on labelled images.

    Args:
        data: a folder with train and val. size: side of an encoder's input in pixels. neighbours: k of kNN.
    """

    def __init__(self, data: Path, size: int, neighbours: int = 20):
        self.data = data
        self.size = size
        self.knn = load(KnnSettings, "evaluate", "knn", overrides=[f"k={neighbours}"])
        # The settings of `cae2pipe evaluate linear --fast`.
        self.linear = load(
            LinearSettings, "evaluate", "linear", overrides=["cached_crops=1", f"sweep={list(FAST_RATES)}"]
        )

    @cached_property
    def crops(self) -> LabelledCrops:
        def refuse(path: Path, reason: str) -> None:
            raise AssertionError(f"{path}: {reason}")

        return LabelledCrops(
            self.data,
            size=self.size,
            batch=CPU_BATCH,
            memory=Memory(10**10),
            workers=0,
            world=World(0, 1, CPU),
            rejected=refuse,
        )

    def accuracies(self, encoder: FrozenEncoder, linear: bool, feature: str = "class") -> dict[str, float | None]:
        """``knn`` and, if requested, ``linear`` top-1 accuracy of an encoder's class token in percent, or of the mean
        of its patches if ``feature`` is mean."""
        right = self.right(encoder, linear, feature)
        return {"linear": None, **{name: percent(each) for name, each in right.items()}}

    def right(self, encoder: FrozenEncoder, linear: bool, feature: str = "class") -> dict[str, Tensor]:
        """Which images of val are classified correctly, by score: bool (N,). Arguments as of ``accuracies``."""
        encode = feature_of(encoder, feature, CPU)
        train, val = (
            in_order_of_runs([self.crops.features(split, encode)]) for split in (self.crops.train, self.crops.val)
        )
        found = {"knn": self.knn_classes(train, val[0]) == val[1]}
        return {**found, "linear": self.linear_classes(train, val[0]) == val[1]} if linear else found

    def knn_classes(self, train: Labelled, val: Tensor) -> Tensor:
        k, classes = self.knn.k[0], len(self.crops.train.classes)
        return knn_predictions(*train, val, classes=classes, k=[k], temperature=self.knn.temperature)[k][0][:, 0]

    def linear_classes(self, train: Labelled, val: Tensor) -> Tensor:
        classes = len(self.crops.train.classes)
        probe, _ = train_probe([train[0]], train[1], classes=classes, settings=self.linear, report=Silent())
        return logits(probe, val).argmax(dim=1)


class Scorer(Labels):
    """Scores students on labelled images and on held-out target views.

    Args:
        data, size: as for ``Labels``. held_out: fp16 targets of the val images' views.
    """

    def __init__(self, data: Path, held_out: TargetSet, size: int, neighbours: int = 20):
        super().__init__(data, size, neighbours)
        self.held_out = held_out

    def score(self, run: RunArtifact, settings: PretrainSettings, step: int, linear: bool) -> dict[str, float | None]:
        """``held_out_loss``; ``knn`` and, if requested, ``linear`` top-1 accuracy of the class token in percent."""
        spec = target_spec(settings, self.held_out)
        model = build_method(settings.method, settings.model, spec.dim, spec.summary)
        model.load_state_dict(read_checkpoint(run.root / "checkpoints", step)["model"])
        vit = build_vit(timm_config(model.encoder))
        vit.load_state_dict(timm_state(model.encoder))
        accuracies = self.accuracies(Student(vit, {}, class_token_trained(run), device=CPU), linear)
        return {**accuracies, "held_out_loss": self.held_out_loss(model, settings)}

    def held_out_loss(self, model: Method, settings: PretrainSettings) -> float:
        """The run's own objective on views of images not used in training, averaged over all views. Masks are the same
        for all runs."""
        objective = make_objective(model, self.held_out, settings).eval()
        total, views = summed_terms(objective, self.held_out_batches(settings, model.drop_columns), cached)
        return float(total[0]) / views

    def held_out_batches(self, settings: PretrainSettings, drop_columns: int) -> Sequence[Batch]:
        """All held-out views, each once, with masks of seed 0. Cached, since the plan is the same for all runs."""
        if not hasattr(self, "_batches"):
            plan = held_out_plan(self.held_out, settings, drop_columns=drop_columns, batch=CPU_BATCH)
            self._batches = list(load_batches(plan, 0, 0))
        return self._batches


def percent(right: Tensor) -> float:
    """Percentage of what is true, bool (N,)."""
    return 100 * float(right.float().mean())


def standard_error(score: float, images: int) -> float:
    """Standard error of an accuracy in percent on ``images`` test images, in points."""
    return math.sqrt(score * (100 - score) / images)


def kept_epochs(run: Path, steps: int, every: int) -> list[int]:
    """Epochs, of ``steps`` steps, whose checkpoint a run keeps permanently: every ``every``-th."""
    kept = (step_of(path) for path in checkpoints(run / "checkpoints"))
    return [step // steps for step in kept if step % (steps * every) == 0]


def training_losses(run: Path) -> dict[int, float]:
    """The mean loss over the images of every started epoch, by the number of epochs at its end."""
    sums: dict[int, list[float]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        entry = sums.setdefault(line["epoch"] + 1, [0.0, 0.0])
        entry[0] += line["loss"] * line["images"]
        entry[1] += line["images"]
    return {epoch: loss / images for epoch, (loss, images) in sums.items()}


def bytes_per_view(targets: TargetSet, views: int) -> dict[str, float]:
    """Mean bytes on disk per view, over a set's first ``views`` views: ``latents`` including their index, ``pixels``
    including the tar."""
    units: list[dict[str, Any]] = [unit for unit in targets.stores.values() if unit["view"] < views]
    samples = sum(unit["samples"] for unit in units)
    return {
        name: sum(entry["bytes"] for unit in units for path, entry in unit["files"].items() if path.startswith(folder))
        / samples
        for name, folder in (("latents", f"{LATENTS_FOLDER}/"), ("pixels", f"{VIEWS_FOLDER}/"))
    }
