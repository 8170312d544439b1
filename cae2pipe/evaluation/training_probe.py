"""Measures a student while it is trained: nearest neighbours on labelled images, and its loss on held-out views.

It works on copies of the student and restores the state of random generators, so training does not depend on it.
Several processes share the images and views.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cae2pipe.artifacts.storage import to_path
from cae2pipe.config.evaluate import FeatureSettings, KnnSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import Cae2pipeError, SourceError
from cae2pipe.evaluation.crop_batches import batch_for
from cae2pipe.evaluation.encoders import Student, build_vit, trains_class_token
from cae2pipe.evaluation.features import resolve_feature
from cae2pipe.evaluation.knn import knn_top1
from cae2pipe.evaluation.labelled_crops import Labelled, LabelledCrops, feature_of, in_order_of_runs
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.joining import join_sets
from cae2pipe.loading.loader import load_batches
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import timm_config, timm_state
from cae2pipe.runtime.device import exact_float32, resolve_precision
from cae2pipe.runtime.device_memory import free_unused, memory_advice
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.remembered import Memory, Remembered
from cae2pipe.runtime.seeded import seeded
from cae2pipe.runtime.signals import stop_asked
from cae2pipe.runtime.world import World
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.fit import check_held_out, paired
from cae2pipe.training.held_out import STREAMS, held_out_plan, summed_terms
from cae2pipe.training.objective import OF_TEACHER, make_objective
from cae2pipe.training.parallel import full_tensor
from cae2pipe.training.probing import Probed
from cae2pipe.training.step import Latents, cached
from cae2pipe.training.target_spec import PixelTargets, target_spec

M = TypeVar("M", bound=nn.Module)


class StopProbeError(Exception):
    """A stop was requested during a probe."""


class TrainingProbe:
    """Measures students of one run. Every process makes all calls, in the same order.

    Args:
        settings: of the run; ``settings.precision`` is resolved. targets, others: the sets that are trained on.
        stores: those that are trained on.

    Raises:
        SettingsError: the held-out targets do not fit the student. SourceError, ManifestError, DamageError: images or
        targets cannot be read. OutOfMemoryError: a pass does not fit the device.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        targets: TargetSet,
        others: Sequence[TargetSet] = (),
        *,
        stores: Sequence[str],
        world: World,
        report: Report,
    ):
        self.settings, self.world, self.report = settings, world, report
        self.batch = batch_for(settings.probe.batch, world.device)
        self.memory = Memory(int(settings.probe.memory_gb * 1e9))
        self.group = world.patient_group()
        self.named: set[Path] = set()
        spec = target_spec(settings, targets, others)
        with seeded("probe"):
            self.model = build_method(settings.method, settings.model, spec.dim, spec.summary)
            self.model = self.model.eval().requires_grad_(False)
            teacher = targets.teacher
            class_token = any(
                trains_class_token(settings.loss, each.class_token, summary=each.summary is not None)
                for each in (teacher, *(other.teacher for other in others))
            )
            self.images = ImageProbe(self, settings.probe.images, class_token) if settings.probe.images else None
            roots = list(map(to_path, settings.probe.sets))
            self.views = HeldOutProbe(self, roots, (targets, *others), stores=stores) if roots else None
        self.check()

    def check(self) -> None:
        """Try one pass of each kind."""
        problem: Cae2pipeError | None = None
        try:
            with self.room(), torch.random.fork_rng(self.devices()):
                if self.images:
                    self.images.check()
                if self.views:
                    self.views.check()
        except Cae2pipeError as error:
            problem = error
        free_unused()
        problems = [error for error in self.world.gather(problem) if error is not None]
        if problems:
            problems[0].shown_elsewhere = not self.world.is_main
            raise problems[0]

    def __call__(self, model: nn.Module) -> Probed:
        """Measure ``model``, whose weights may be sharded."""
        own = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            own[name].copy_(full_tensor(tensor))
        share: dict[str, Any] = {}
        try:
            with self.room(), torch.random.fork_rng(self.devices()):
                torch.manual_seed(keyed_seed("probe"))
                if self.images:
                    share |= self.images.share()
                if self.views:
                    share |= {"views": self.views.share()}
        except (Cae2pipeError, StopProbeError) as error:
            # A signal to all processes of a job also ends the workers.
            share = {"error": StopProbeError() if stop_asked() else error}
        free_unused()
        shares = self.world.gather_on_main(share, self.group)
        return self.world.answer_of_main(self.result(shares) if self.world.is_main else Probed(), self.group)

    def result(self, shares: list[dict[str, Any]]) -> Probed:
        """The figures of all processes' shares."""
        errors = [share["error"] for share in shares if "error" in share]
        if any(isinstance(error, StopProbeError) for error in errors):
            return Probed(stopped=True)
        if errors:
            return Probed(problem=told(errors[0]))
        try:
            with self.room():
                figures = self.images.figures(shares) if self.images else {}
        except Cae2pipeError as error:
            return Probed(problem=told(error))
        return Probed(figures | (self.views.figures(shares) if self.views else {}))

    def room(self) -> Any:
        fix = f"--set probe.batch={max(1, self.batch // 4)}"
        return memory_advice(f"a probe with {self.batch} images per pass", fix, "probe")

    def devices(self) -> list[torch.device]:
        return [] if self.world.device.type == "cpu" else [self.world.device]

    def workers(self, most: int | None = None) -> int:
        return worker_count(self.settings.speed.workers, most)

    def name_reject(self, path: Path, reason: str) -> None:
        """Log an image that cannot be decoded, once."""
        if path not in self.named:
            self.named.add(path)
            self.report.log(f"probe: skipped {path}: {reason}")


class ImageProbe:
    """Accuracy of nearest neighbours on labelled images, as ``cae2pipe evaluate knn`` scores the finished run."""

    def __init__(self, probe: TrainingProbe, data: Path, class_token: bool):
        self.probe, self.device = probe, probe.world.device
        self.knn = KnnSettings()
        self.crops = LabelledCrops(
            data,
            size=probe.settings.model.image_size,
            batch=probe.batch,
            memory=probe.memory,
            workers=probe.settings.speed.workers,
            world=probe.world,
            rejected=probe.name_reject,
        )
        self.vit = build_vit(timm_config(probe.model.encoder))
        self.class_token = class_token

    def encode(self) -> Callable[[Tensor], Tensor]:
        """From crops to features of the student as it is now."""
        self.vit.load_state_dict(timm_state(self.probe.model.encoder))
        encoder = Student(
            copied(self.vit, self.device),
            {},
            self.class_token,
            device=self.device,
            precision=resolve_precision("auto", self.device),
        )
        features = feature_of(encoder, resolve_feature(FeatureSettings(), encoder), self.device)

        def encoded(pixels: Tensor) -> Tensor:
            if stop_asked():
                raise StopProbeError
            with exact_float32(self.device):
                return features(pixels)

        return encoded

    def check(self) -> None:
        side = self.probe.settings.model.image_size
        self.encode()(torch.zeros(self.probe.batch, 3, side, side, dtype=torch.uint8))

    def share(self) -> dict[str, list[Labelled]]:
        """Features of this process's images."""
        encode = self.encode()
        return {name: self.crops.features(split, encode) for name, split in self.splits().items()}

    def splits(self) -> dict[str, Any]:
        return {"train": self.crops.train, "val": self.crops.val}

    def figures(self, shares: list[dict[str, Any]]) -> dict[str, float]:
        train, val = (in_order_of_runs([share[name] for share in shares]) for name in self.splits())
        for split, images in ((self.crops.train, train), (self.crops.val, val)):
            if not len(images.labels):
                raise SourceError("no image here can be decoded", where=split.root, fix="check the folder")
        k = min(self.probe.settings.probe.k, len(train.labels))
        train_features, train_labels, features = (
            tensor.to(self.device) for tensor in (train.features, train.labels, val.features)
        )
        top1 = knn_top1(
            train_features,
            train_labels,
            features,
            val.labels,
            classes=len(self.crops.train.classes),
            k=k,
            temperature=self.knn.temperature,
        )
        return {"knn_top1": top1, "k": k}


def opened(root: Path, pixels: str | None, sets: int) -> TargetSet:
    """One of ``sets`` sets of held-out views. ``pixels``: the folder with those of sets by reference."""
    targets = TargetSet(root)
    return TargetSet(root, pixels=pixels) if pixels and (targets.artifact.by_reference or sets == 1) else targets


class HeldOutProbe:
    """Mean loss and cosines over held-out views, in eval mode, with the same masks every time."""

    def __init__(
        self, probe: TrainingProbe, roots: Sequence[Path], sets: Sequence[TargetSet], *, stores: Sequence[str]
    ):
        # No teacher is dropped.
        loss = probe.settings.loss.model_copy(update={"drop_teachers": 0.0})
        self.probe, world, settings = probe, probe.world, probe.settings.model_copy(update={"loss": loss})
        self.device = world.device
        held_out = world.main_first(lambda: [opened(root, settings.probe.pixels, len(roots)) for root in roots])
        world.run_on_main(lambda: check_held_out(held_out, sets, settings))
        joined = world.main_first(lambda: join_sets(paired(held_out, sets)))
        if joined.note:
            probe.report.log(f"held-out views: {joined.note}")
        self.plan = held_out_plan(
            joined.main,
            settings,
            drop_columns=probe.model.drop_columns,
            batch=probe.batch,
            ranks=world.ranks,
            blocks=settings.probe.blocks,
            others=joined.others,
        )
        # Cosines have the same centre as those of training, and targets the same scale.
        self.objective = make_objective(
            probe.model, sets[0], settings, others=sets[1:], stores=stores, read=joined.sets
        ).eval()
        self.latents: Latents = cached
        if settings.loss.target == "pixels":
            self.latents = PixelTargets(settings.model.grid, self.device)
        self.batches = Remembered(lambda: self.read(probe.workers(STREAMS)), bytes_of, probe.memory)

    def read(self, workers: int) -> Iterator[Batch]:
        world = self.probe.world
        return load_batches(self.plan, 0, workers, rank=world.rank, ranks=world.ranks)

    def check(self) -> None:
        self.sums(iter([next(self.read(0))]))

    def share(self) -> tuple[Tensor, int]:
        """Sums over this process's views, and the number of views of all processes."""
        return self.sums(iter(self.batches))

    def sums(self, batches: Iterator[Batch]) -> tuple[Tensor, int]:
        def uploaded() -> Iterator[Batch]:
            for batch in batches:
                if stop_asked():
                    raise StopProbeError
                yield batch.to(self.device)

        return summed_terms(copied(self.objective, self.device), uploaded(), self.latents)

    def figures(self, shares: list[dict[str, Any]]) -> dict[str, float]:
        total = torch.stack([share["views"][0] for share in shares]).sum(dim=0)
        means = dict(zip(self.objective.terms, (total / shares[0]["views"][1]).tolist(), strict=True))
        return {f"held_out_{name}": mean for name, mean in means.items() if name.partition("/")[0] in OF_TEACHER}


def copied(module: M, device: torch.device) -> M:
    """A module on a device: a copy, so that nothing stays there when it is no longer used."""
    return module if device.type == "cpu" else copy.deepcopy(module).to(device)


def bytes_of(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    tensors = (batch.pixels, batch.visible, batch.masked, batch.drop, *batch.arrays.values())
    return sum(tensor.nbytes for tensor in tensors)


def told(error: Exception) -> str:
    """An error in one line."""
    if not isinstance(error, Cae2pipeError):
        return str(error)
    return f"{error.where}: {error.what}" if error.where else error.what
