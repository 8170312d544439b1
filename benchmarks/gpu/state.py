"""The common inputs of all parts: the device, the scale, and synthetic photographs, teachers and labelled images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.sample import copies, photographs, random_weights, write_noise
from cae2pipe.artifacts.lock import holding
from cae2pipe.config.base import build, load, merge
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class Scale:
    """Size of the models for checks of correctness: views of ``image`` pixels in patches of ``patch``, a teacher and a
    student of these widths and depths, and ``photographs`` for extraction."""

    image: int
    patch: int
    teacher_width: int
    width: int
    depth: int
    heads: int
    photographs: int

    @property
    def model(self) -> dict[str, Any]:
        """Settings of the student."""
        return {
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "predictor_depth": 1,
            "predictor_width": self.width,
            "predictor_heads": self.heads,
        }

    @property
    def teacher(self) -> dict[str, Any]:
        """Settings of the teacher without weights."""
        return {
            "kind": "open_clip",
            "name": "tiny",
            "vision_cfg": {
                "image_size": self.image,
                "patch_size": self.patch,
                "width": self.teacher_width,
                "layers": 2,
                "head_width": self.teacher_width // 2,
                "mlp_ratio": 2.0,
            },
            "embed_dim": self.teacher_width // 2,
            "quick_gelu": False,
            "image_size": self.image,
        }


FULL = Scale(image=224, patch=16, teacher_width=128, width=192, depth=2, heads=6, photographs=4096)
QUICK = Scale(image=32, patch=8, teacher_width=32, width=32, depth=2, heads=2, photographs=128)
IMAGES = 150
"""Images of the small target set: four steps of 32 and a padded fifth."""
CLASSES = ("red", "green", "blue", "grey")


@dataclass(frozen=True)
class State:
    """The inputs of a part. Child processes get the same as JSON.

    Args:
        device: with its index. quick: tiny models. scratch: a folder that all parts share, with results that other
        parts reuse. sizes: sizes of the students whose speed is measured.
    """

    device: str
    quick: bool
    scratch: Path
    sizes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scratch": str(self.scratch)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        return cls(values["device"], values["quick"], Path(values["scratch"]), tuple(values["sizes"]))

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_cuda(self) -> bool:
        return self.place.type == "cuda"

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    @property
    def backend(self) -> str:
        """The compiler in checks of compilation. On a CPU, where compiling would take most of the time, graphs are only
        traced and run eagerly."""
        return "inductor" if self.on_cuda else "eager"

    def once(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder ``name`` in the scratch folder, made by the first part that needs it; others wait for it."""
        folder = self.scratch / name
        with holding(self.scratch, name):
            if not (self.scratch / f"{name}.made").exists():
                make(folder)
                (self.scratch / f"{name}.made").touch()
        return folder

    def remember(self, name: str, value: Any) -> None:
        """Store a value for later parts, also in other processes."""
        (self.scratch / f"{name}.json").write_text(json.dumps(value))

    def recall(self, name: str, default: Any) -> Any:
        """A stored value, or the default if the part has not run."""
        path = self.scratch / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else default

    def settings(self, preset: str = "base", **over: Any) -> PretrainSettings:
        """A preset of pretraining at this scale, in float32, two epochs of the small set; ``over`` overrides them."""
        values = {
            "epochs": 2,
            "precision": "fp32",
            "model": self.scale.model,
            "optimizer": {"warmup_epochs": 1},
            "data": {"batch": 32, "streams": 4, "window": 2},
            "speed": {"workers": 0, "device": self.device, "compile": False},
        }
        return load(PretrainSettings, "pretrain", preset, overrides=(), values=merge(values, over))

    def targets(self) -> TargetSet:
        """The small target set: noise, and latents of a small teacher with random weights, computed on the CPU."""
        return TargetSet(self.once("targets", self._make_targets))

    def _make_targets(self, folder: Path) -> None:
        weights = random_weights("tiny", self.scratch, self.scale.teacher)
        side = self.scale.image * 5 // 4
        write_noise(self.scratch / "noise" / "class", IMAGES, (side, side))
        settings = build(ExtractSettings, self.extraction("cpu", weights), "the small target set")
        extract_targets(self.scratch / "noise", folder, settings, report=Silent())

    def extraction(self, device: str, weights: Path) -> dict[str, Any]:
        """Settings of extraction with the small teacher."""
        return {
            "teacher": {**self.scale.teacher, "weights": str(weights)},
            "views": 1,
            "view": {"size": self.scale.image},
            "codec": {"calibration": 64},
            "shard": {"samples": 70, "speed": {"workers": 0}},
            "speed": {"workers": 0, "device": device},
        }

    def clip_settings(self, **over: Any) -> ExtractSettings:
        """Settings of extraction with the paper's teacher and random weights; with the small teacher if ``quick``."""
        if self.quick:
            self.targets()
            values = self.extraction(self.device, self.scratch / "tiny.safetensors")
            return build(ExtractSettings, merge(values, over), "quick extraction")
        made = self.once("clip", lambda folder: (folder.mkdir(), random_weights("clip-b16", folder)))
        values = {
            "teacher": {"weights": str(made / "clip-b16.safetensors"), "pretrained": None},
            "views": 1,
            # The time of the calibration, on one core, is proportional to its images.
            "codec": {"calibration": 64},
            "speed": {"device": self.device},
        }
        return load(ExtractSettings, "extract", "clip-b16", overrides=(), values=merge(values, over))

    def shards(self) -> ShardSet:
        """Photographs for extraction, their number set by the scale: copies of a hundred photographs, or of noise."""

        def make(folder: Path) -> None:
            source = photographs(self.scratch / "originals", 8 if self.quick else 100)
            found = sum(path.is_file() for path in source.rglob("*"))
            source = copies(source, self.scratch / "originals", -(-self.scale.photographs // found))
            build_shard_set(source, folder, self.clip_settings().shard, report=Silent())

        return ShardSet.open(self.once("shards", make))

    def clip_targets(self, pixels: str = "replayed") -> TargetSet:
        """One view of all photographs, extracted on the device; ``pixels`` as in the settings of views."""

        def make(folder: Path) -> None:
            settings = self.clip_settings(view={"pixels": pixels})
            extract_targets(self.shards().root, folder, settings, report=Silent())

        return TargetSet(self.once(f"clip-targets-{pixels}", make))

    def labelled(self) -> Path:
        """Images of four colours with noise, for training and scoring: even an untrained encoder distinguishes them."""
        return self.once("labelled", self._make_labelled)

    def _make_labelled(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        colours = np.array([(200, 30, 30), (30, 190, 40), (30, 40, 200), (120, 120, 120)])
        for part, each in (("train", 8 if self.quick else 64), ("val", 4 if self.quick else 16)):
            for name, colour in zip(CLASSES, colours, strict=True):
                (folder / part / name).mkdir(parents=True)
                for number in range(each):
                    pixels = np.clip(colour + rng.integers(-20, 21, (40, 44, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / part / name / f"{number}.png")

    def encoder(self) -> Path:
        """An exported encoder of this scale before training."""

        def make(folder: Path) -> None:
            folder.mkdir()
            torch.manual_seed(0)
            scale = self.scale
            encoder = Encoder(
                width=scale.width,
                depth=scale.depth,
                heads=scale.heads,
                image_size=scale.image,
                patch_size=scale.patch,
            )
            export_encoder(encoder, folder)

        return self.once("encoder", make)
