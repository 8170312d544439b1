"""Fixtures shared by several folders: a tiny teacher, a few images, and a target set made of them."""

from __future__ import annotations

import gc
import json
import os
import shutil

# Tests run in parallel processes on few cores, where several threads per process would only compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from cae2pipe.config.base import build, merge
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import PretrainSettings
from tests.seconds import pytest_terminal_summary  # noqa: F401 - a hook

# The time of an example means nothing on a busy machine.
hypothesis.settings.register_profile("untimed", parent=hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Imported modules stay alive, so the garbage collector does not need to scan their objects again."""
    gc.collect()
    gc.freeze()


SIZE, PATCH, DIM = 32, 8, 16
"""Views of 32 pixels in a 4 x 4 grid, targets of 16 dimensions: enough to test everything that does not learn."""


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real images and weights named by CAE2PIPE_REAL; tests that need it skip without it."""
    folder = os.environ.get("CAE2PIPE_REAL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CAE2PIPE_REAL names no folder of real data")
    return Path(folder)


def write_photos(folder: Path, classes: int, each: int, seed: int = 0) -> Path:
    """Small images with some structure, ``classes`` folders of ``each``, of varied sizes."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            coarse = rng.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
            size = (int(rng.integers(40, 60)), int(rng.integers(40, 60)))
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            image.save(folder / f"class{label}" / f"image{number:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images in 3 classes."""
    return write_photos(tmp_path_factory.mktemp("photos") / "images", classes=3, each=50)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a two-layer open_clip tower."""
    import torch
    from open_clip.transformer import VisionTransformer
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tower = VisionTransformer(
        image_size=SIZE, patch_size=PATCH, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=DIM
    )
    # Untrained towers give nearly the same token everywhere; with these weights tokens differ by patch.
    with torch.no_grad():
        tower.conv1.weight.mul_(5)
    path = tmp_path_factory.mktemp("teacher") / "tower.safetensors"
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def extract_settings(teacher_file: Path) -> Callable[..., ExtractSettings]:
    """Settings for the tiny teacher; keyword arguments override them, section by section."""

    def settings(**over: Any) -> ExtractSettings:
        raw = {
            "teacher": {
                "kind": "open_clip",
                "name": "tiny",
                "weights": str(teacher_file),
                "vision_cfg": {
                    "image_size": SIZE,
                    "patch_size": PATCH,
                    "width": 32,
                    "layers": 2,
                    "head_width": 16,
                    "mlp_ratio": 2.0,
                },
                "embed_dim": DIM,
                "quick_gelu": False,
                "image_size": SIZE,
            },
            "views": 2,
            "view": {"size": SIZE},
            # Fine enough for tests that compare decoded tokens.
            "codec": {"calibration": 64, "fidelity": 0.999},
            "shard": {"samples": 70, "speed": {"workers": 0}},
            "speed": {"workers": 0, "device": "cpu"},
        }
        return build(ExtractSettings, merge(raw, over), "test")

    return settings


@pytest.fixture(scope="session")
def pretrain_settings() -> Callable[..., PretrainSettings]:
    """Settings for a student that trains in a second; keyword arguments override them."""

    def settings(**over: Any) -> PretrainSettings:
        raw = {
            "epochs": 2,
            "model": {
                "width": 32,
                "depth": 2,
                "heads": 2,
                "image_size": SIZE,
                "patch_size": PATCH,
                "drop_path": 0.1,
                "predictor_depth": 1,
                "predictor_width": 32,
                "predictor_heads": 2,
            },
            "mask": {"ratio": 0.4},
            "optimizer": {"warmup_epochs": 1},
            "data": {"batch": 32, "streams": 4, "window": 2},
            "speed": {"workers": 0, "device": "cpu"},
        }
        return build(PretrainSettings, merge(raw, over), "test")

    return settings


@pytest.fixture(scope="session")
def target_root(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, extract_settings: Callable[..., ExtractSettings]
) -> Path:
    """A finished target set of 150 images in two replayed views, klt codec. Read-only."""
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.extract_targets import extract_targets

    out = tmp_path_factory.mktemp("targets") / "set"
    extract_targets(photos, out, extract_settings(), report=Silent())
    return out


@pytest.fixture(scope="session")
def stored_root(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, extract_settings: Callable[..., ExtractSettings]
) -> Path:
    """The same with stored views."""
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.extract_targets import extract_targets

    out = tmp_path_factory.mktemp("targets") / "stored"
    extract_targets(photos, out, extract_settings(view={"pixels": "stored"}), report=Silent())
    return out


@pytest.fixture(scope="session")
def int8_root(tmp_path_factory: pytest.TempPathFactory, target_root: Path) -> Path:
    """``target_root`` recoded with the int8 codec. Not to be written to."""
    from cae2pipe.config.extract import CodecSettings
    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.recode import recode

    out = tmp_path_factory.mktemp("recoded") / "set"
    recode(target_root, out, CodecSettings(name="int8"), report=Silent(), lossy_source=True, workers=0)
    return out


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported encoder of 32 pixels and width 32."""
    import torch

    from cae2pipe.models.encoder import Encoder
    from cae2pipe.models.export import export_encoder

    torch.manual_seed(3)
    folder = tmp_path / "exported"
    folder.mkdir()
    export_encoder(Encoder(width=32, depth=2, heads=2, image_size=32, patch_size=8), folder)
    return folder


@pytest.fixture(scope="session")
def trained_run(
    tmp_path_factory: pytest.TempPathFactory, target_root: Path, pretrain_settings: Callable[..., PretrainSettings]
) -> Callable[..., Path]:
    """A run of pretrain on ``target_root``, made once for each settings. Read-only."""
    import torch

    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.pretrain import pretrain

    made: dict[str, Path] = {}

    def run(**over: Any) -> Path:
        key = json.dumps(over, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / f"run{len(made)}"
            # A test that asks for it may compute without gradients.
            with torch.enable_grad():
                pretrain(target_root, out, pretrain_settings(**over), report=Silent())
            made[key] = out
        return made[key]

    return run


@pytest.fixture
def make_run(trained_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of it that may be changed."""

    def make(**over: Any) -> Path:
        made = trained_run(**over)
        return Path(shutil.copytree(made, tmp_path / made.name))

    return make


@pytest.fixture
def graphs(monkeypatch):
    """Compiles with a backend that only counts: ``frame_count`` graphs so far."""
    import torch
    from torch._dynamo.testing import CompileCounter

    counter, compile_module = CompileCounter(), torch.nn.Module.compile

    def compiled(module, **options):
        compile_module(module, **{**options, "backend": counter})

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    yield counter
    torch.compiler.reset()


@pytest.fixture
def backends():
    """Puts back how float32 is computed."""
    import torch

    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark


def edit_manifest(root: Path, **changes: Any) -> None:
    """Override fields of a manifest, and fix its digest."""
    from cae2pipe.artifacts.manifest import seal

    path = root / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_bytes(seal({**manifest, **changes}))


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``root`` with its bytes and the time of its last change."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != ".locks")
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` with its bytes."""
    return {name: data for name, (data, _) in snapshot(root).items()}


@pytest.fixture(scope="session")
def summary_root(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, extract_settings: Callable[..., ExtractSettings]
) -> Path:
    """A target set of a teacher without a class token, with a summary and two layers. Read-only."""
    from tests.pooling_teacher import extract_pooling

    return extract_pooling(photos, tmp_path_factory.mktemp("targets") / "summary", extract_settings())


@pytest.fixture(scope="session")
def second_file(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Path:
    """Other weights of the teacher's tower."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(5)
    path = tmp_path_factory.mktemp("second") / "second.safetensors"
    weights = load_file(teacher_file)
    save_file({name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in weights.items()}, path)
    return path


@pytest.fixture(scope="session")
def wide_root(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Path,
    teacher_file: Path,
    extract_settings: Callable[..., ExtractSettings],
) -> Path:
    """A target set of the views of ``target_root``, of a teacher with a class token and 24 dimensions. Read-only."""
    import torch
    from safetensors.torch import load_file, save_file

    from cae2pipe.runtime.progress import Silent
    from cae2pipe.stages.extract_targets import extract_targets

    folder = tmp_path_factory.mktemp("wide")
    weights = load_file(teacher_file)
    generator = torch.Generator().manual_seed(5)
    weights["visual.proj"] = torch.randn(len(weights["visual.proj"]), 24, generator=generator)
    save_file(weights, folder / "wide.safetensors")
    teacher = {"name": "wide", "weights": str(folder / "wide.safetensors"), "embed_dim": 24}
    extract_targets(photos, folder / "set", extract_settings(teacher=teacher), report=Silent())
    return folder / "set"
