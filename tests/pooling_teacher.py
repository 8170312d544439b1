"""A small teacher without a class token, with a summary of its own width and the tokens of earlier blocks."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cae2pipe.teachers.protocol import Teacher, TeacherInfo, TeacherOutput
from cae2pipe.teachers.weights import weights_digest

DIM, WIDTH, LAYERS = 16, 24, (1, 2)


class PoolingViT(Teacher):
    """timm's transformer with attention pooling; its summary is what its own head gives."""

    def __init__(self, model: Any, layers: tuple[int, ...], device: torch.device):
        info = TeacherInfo(
            library="timm",
            name="pooling",
            architecture={},
            weights=weights_digest(model),
            dim=DIM,
            rows=4,
            cols=4,
            class_token=False,
            image_size=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            precision="fp32",
            summary=WIDTH,
            layers=layers,
        )
        super().__init__(info, device)
        self.model = model.to(device).eval().requires_grad_(False)

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        indices = [layer - 1 for layer in self.info.layers]
        x, taps = self.model.forward_intermediates(pixels, indices=indices, norm=True, output_fmt="NLC")
        layers = dict(zip(self.info.layers, taps, strict=True))
        return TeacherOutput(x, None, self.model.forward_head(x), layers)


def pooling_teacher(layers: tuple[int, ...] = LAYERS) -> PoolingViT:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=DIM,
            depth=3,
            num_heads=2,
            class_token=False,
            global_pool="map",
            num_classes=WIDTH,
        )
        with torch.no_grad():
            # Untrained, all tokens and images would look alike.
            model.patch_embed.proj.weight.mul_(20)
            model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return PoolingViT(model, layers, torch.device("cpu"))


@contextmanager
def pooling(layers: tuple[int, ...] = LAYERS):
    """The commands take this teacher, whatever the settings name."""
    teacher = pooling_teacher(layers)
    names = ("stages.extract_targets", "stages.estimate_targets", "teachers.load")
    patches = [patch(f"cae2pipe.{name}.load_teacher", lambda *_, **__: teacher) for name in names]
    for each in patches:
        each.start()
    try:
        yield teacher
    finally:
        for each in patches:
            each.stop()


def extract_pooling(photos: Path, out: Path, settings: Any, layers: tuple[int, ...] = LAYERS, **options: Any) -> Path:
    """A target set of this teacher."""
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.extract_targets import extract_targets

    with pooling(layers):
        extract_targets(photos, out, settings, report=Silent(), **options)
    return out
