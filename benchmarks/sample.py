"""Data of the benchmarks: real photographs and a trained teacher, or synthetic ones without CAE2PIPE_REAL."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import real_folder
from cae2pipe.config.base import build, load
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.rendering import RenderedBlock, Renderer, Task, render_blocks
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher


def settings(device: str, scratch: Path, **over: Any) -> ExtractSettings:
    """Stage 1 with the ViT-Ti teacher: the trained one with real data, otherwise random weights. Views are stored
    unless ``over`` changes that."""
    real = real_folder()
    if real:
        weights = real / "teachers" / "vit_tiny_patch16_224.timm.safetensors"
    else:
        import timm
        from safetensors.torch import save_file

        torch.manual_seed(0)
        weights = scratch / "random.safetensors"
        save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    values = {
        "teacher": {"weights": str(weights)},
        "view": {"pixels": "stored"},
        # Not the default: all results so far were measured with this value.
        "codec": {"fidelity": 0.999},
        "speed": {"device": device},
        **over,
    }
    return load(ExtractSettings, "extract", "vit-tiny-in21k", overrides=(), values=values)


def random_weights(preset: str, scratch: Path, values: dict[str, Any] | None = None) -> Path:
    """A file of random weights for the open_clip teacher of a preset, or of one that ``values`` describe."""
    from open_clip.model import _build_vision_tower
    from safetensors.torch import save_file

    from cae2pipe.teachers.open_clip_towers import tower_shape

    teacher = build(TeacherSettings, values, preset) if values else load(ExtractSettings, "extract", preset).teacher
    shape = tower_shape(teacher)
    torch.manual_seed(0)
    tower = _build_vision_tower(shape["embed_dim"], shape["vision_cfg"], quick_gelu=shape["quick_gelu"])
    with torch.no_grad():
        tower.conv1.weight.mul_(5)  # untrained towers give nearly the same token everywhere
    path = scratch / f"{preset}.safetensors"
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}, path)
    return path


def photographs(scratch: Path, images: int) -> Path:
    """A folder of about 100 full-size photographs, or of noise of their size without real data."""
    if real := real_folder():
        return real / "imagenet-samples"
    write_noise(scratch / "photographs" / "noise", images, (500, 375))
    return scratch / "photographs"


def write_noise(folder: Path, images: int, size: tuple[int, int]) -> None:
    """JPEGs of coloured noise with some structure, width and height as given."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    coarse = (max(1, size[1] // 8), max(1, size[0] // 8), 3)
    for number in range(images):
        small = generator.integers(0, 256, coarse, dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def copies(source: Path, scratch: Path, count: int) -> Path:
    """Several copies of the photographs, each in its own folders: with a hundred images edge effects would dominate."""
    for copy in range(count):
        for folder in source.iterdir():
            shutil.copytree(folder, scratch / "copies" / f"{folder.name}-{copy}")
    return scratch / "copies"


def crops(scratch: Path) -> Path:
    """A folder of many small photographs (imagenette's training images)."""
    real = real_folder()
    return real / "imagenette" / "train" if real else photographs(scratch, 400)


def rendered(
    shards: ShardSet, chosen: ExtractSettings, blocks: int, views: tuple[int, ...] = (0,)
) -> list[RenderedBlock]:
    """The first whole blocks of a shard set, rendered."""
    tasks = [Task(shard, block, views) for shard in shards.shards for block in range(shard.samples // BLOCK)][:blocks]
    return list(render_blocks(Renderer(shards, tasks, chosen.view, seed=chosen.seed), 0))


def packed(source: Path, scratch: Path, chosen: ExtractSettings, name: str = "shards") -> ShardSet:
    return build_shard_set(source, scratch / name, chosen.shard, report=Silent())


def teacher_of(chosen: ExtractSettings) -> Teacher:
    return load_teacher(chosen.teacher, pick_device(chosen.speed.device))


def tokens_of(teacher: Teacher, blocks: list[RenderedBlock]) -> Tensor:
    """Raw tokens (n, T, D) of view 0 of all blocks, on the CPU."""
    return torch.cat([teacher(block.pixels[0].to(teacher.device)).tokens.cpu() for block in blocks])
