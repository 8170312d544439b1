"""The published precision of each family, and what fp16 does to activations beyond its range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.check import check_output
from cae2pipe.teachers.load import load_teacher, named_without_paths
from cae2pipe.teachers.precision import published_precision, resolve_precision
from cae2pipe.teachers.protocol import TeacherOutput

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DINOV3 = "vit_tiny_patch16_dinov3_qkvb"
"""The smallest model of DINOv3's architecture."""


@pytest.mark.parametrize(
    ("kind", "name", "tag", "precision"),
    [
        ("timm", "vit_large_patch16_dinov3.lvd1689m", None, "bf16"),
        ("timm", "convnext_base.eupe_lvd1689m", None, "bf16"),
        ("timm", "vit_large_patch14_reg4_dinov2.lvd142m", None, "fp16"),
        ("timm", "vit_so400m_patch16_siglip_512.v2_webli", None, "bf16"),
        ("open_clip", "ViT-SO400M-14-SigLIP2-378", "webli", "bf16"),
        ("timm", "naflexvit_huge_patch16_radio_v4.c_radio", None, "bf16"),
        ("timm", "eva02_large_patch14_clip_336.merged2b", None, "fp16"),
        ("timm", "eva02_enormous_patch14_clip_224.laion2b_plus", None, "bf16"),
        ("open_clip", "EVA02-E-14-plus", "laion2b_s9b_b144k", "bf16"),
        ("open_clip", "EVA02-E-14", "laion2b_s4b_b115k", "fp16"),
        ("open_clip", "PE-Core-L-14-336", "meta", "fp16"),
        ("open_clip", "ViT-B-16-quickgelu", "openai", "fp16"),
        ("timm", "convnext_base", "fb_in22k", "fp16"),
        ("timm", "convnext_base", "dinov3_lvd1689m", "bf16"),
    ],
)
def test_a_models_precision_is_its_familys(kind, name, tag, precision, monkeypatch):
    settings = TeacherSettings(kind=kind, name=name, pretrained=tag)
    assert published_precision(settings) == precision
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_precision(settings, CUDA) == precision
    assert resolve_precision(settings, CPU) == "fp32"
    # A set keeps the precision that it was begun with.
    assert resolve_precision(settings, CUDA, begun="fp16") == "fp16"
    assert resolve_precision(settings.model_copy(update={"precision": "fp32"}), CUDA, begun="fp16") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_precision(settings, CUDA) == {"bf16": "fp32", "fp16": "fp16"}[precision]


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({"architecture": "vit_small_patch14_dinov2"}, "fp16"),
        ({"architecture": "vit_base_patch16_siglip_224"}, "bf16"),
        ({"architecture": "convnext_base", "pretrained_cfg": {"tag": "dinov3_lvd1689m"}}, "bf16"),
        ({"architecture": "convnext_base", "pretrained_cfg": {"tag": "fb_in22k"}}, "fp16"),
    ],
)
def test_a_described_models_precision_is_its_architectures(config, precision, hub_cache, tmp_path):
    """Neither the path of a folder nor the name of a repository decides."""
    folder = tmp_path / ("siglip" if precision == "fp16" else "dinov2") / "model"
    folder.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    repository = "me/siglip" if precision == "fp16" else "me/x"
    (hub_cache(repository, "x.safetensors", {}).parent / "config.json").write_text(json.dumps(config))
    for name in (f"local-dir:{folder}", f"hf-hub:{repository}"):
        settings = TeacherSettings(kind="timm", name=name)
        assert published_precision(settings) == precision, name
        assert published_precision(named_without_paths(settings)) == precision, name


def test_a_tower_of_open_clip_has_the_precision_of_its_trunk():
    trunk = {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 224}
    settings = TeacherSettings(kind="open_clip", name="mine", vision_cfg=trunk, embed_dim=768)
    assert published_precision(settings) == "bf16"
    plain = {"width": 64, "layers": 2, "patch_size": 16, "image_size": 224}
    settings = TeacherSettings(kind="open_clip", name="not-siglip", vision_cfg=plain, embed_dim=64)
    assert published_precision(settings) == "fp16"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv3's smallest architecture with one channel whose activations are above 65504, as trained ones have."""
    torch.manual_seed(0)
    model = timm.create_model(DINOV3, pretrained=False, num_classes=0)
    with torch.no_grad():
        block = model.blocks[6]
        block.mlp.fc1.bias.fill_(50)
        block.mlp.fc2.weight[7].fill_(4)
    path = tmp_path_factory.mktemp("planted") / "w.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_outliers_overflow_in_fp16_and_not_in_bf16(planted):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = ["dog/one", "dog/two"]

    def run(precision: str) -> TeacherOutput:
        settings = TeacherSettings(kind="timm", name=DINOV3, weights=planted, image_size=32, precision=precision)
        teacher = load_teacher(settings, CPU)
        output = teacher(pixels)
        check_output(output, teacher.info, keys, "shard 000003")
        return output

    exact, rounded = run("fp32"), run("bf16")
    assert torch.nn.functional.cosine_similarity(exact.tokens, rounded.tokens, dim=-1).min() > 0.99
    with pytest.raises(TeacherError, match=r"class token is not finite .*first in image dog/one") as refused:
        run("fp16")
    assert "--set teacher.precision=bf16" in refused.value.fix
    assert refused.value.where == "shard 000003"
