from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import TeacherInfo
from cae2pipe.teachers.timm import TimmViT

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def vit() -> Any:
    """timm's own tiny ViT for tests, with its classifier."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval()


@pytest.fixture(scope="module")
def vit_file(vit, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def vit_settings(weights: Path | None, **over: Any) -> TeacherSettings:
    return TeacherSettings(kind="timm", name="test_vit", weights=weights, image_size=64).model_copy(update=over)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - 0.5) / 0.5


def test_a_vits_tokens_are_those_after_its_final_norm(vit, vit_file, pixels):
    teacher = load_teacher(vit_settings(vit_file), CPU)
    assert teacher.info.mean == teacher.info.std == HALF  # timm's configuration of this model
    assert (teacher.info.rows, teacher.info.cols, teacher.info.class_token) == (4, 4, True)
    with torch.inference_mode():
        expected = vit.forward_features(normalised(pixels))
    torch.testing.assert_close(teacher(pixels).tokens, expected, rtol=1e-4, atol=1e-5)


def test_a_vits_attention_is_its_last_blocks(vit, vit_file, pixels, monkeypatch):
    attention = load_teacher(vit_settings(vit_file), CPU)(pixels).attention
    last, seen = vit.blocks[-1].attn, []
    monkeypatch.setattr(last, "fused_attn", False)
    with last.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out)), torch.inference_mode():
        vit.forward_features(normalised(pixels))
    torch.testing.assert_close(attention, seen[0].mean(dim=1)[:, 0, 1:], rtol=1e-4, atol=1e-6)


def tiny_vit(**options: Any) -> TimmViT:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, **options)
    class_token = model.cls_token is not None
    info = TeacherInfo("timm", "tiny", {}, "", 32, 4, 4, class_token, 32, HALF, HALF, "fp32")
    return TimmViT(model, info, CPU)


def test_registers_are_left_out(pixels):
    teacher = tiny_vit(reg_tokens=3, qk_norm=True)
    output = teacher(pixels[:, :, :32, :32])
    with torch.inference_mode():
        whole = teacher.model.forward_features(normalised(pixels[:, :, :32, :32]))
    assert whole.shape[1] == 1 + 3 + 16
    torch.testing.assert_close(output.tokens, whole[:, [0, *range(4, 20)]])
    assert output.attention.shape == (3, 16)
    # Attention to the registers and to the class token is missing from the sum.
    assert bool((output.attention.sum(dim=1) < 0.95).all())


def test_a_norm_kept_for_after_pooling_is_applied_to_tokens(pixels):
    teacher = tiny_vit(global_pool="avg")
    assert isinstance(teacher.model.norm, torch.nn.Identity)
    tokens = teacher(pixels[:, :, :32, :32]).tokens
    torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(3, 17), rtol=0, atol=1e-5)


def test_without_a_class_token_there_is_no_attention(pixels):
    teacher = tiny_vit(class_token=False, global_pool="avg")
    output = teacher(pixels[:, :, :32, :32])
    assert output.tokens.shape == (3, 16, 32)
    assert output.attention is None


def test_blocks_of_another_kind_give_tokens_but_no_attention(pixels):
    from timm.models.vision_transformer import ResPostBlock

    output = tiny_vit(block_fn=ResPostBlock)(pixels[:, :, :32, :32])
    assert output.tokens.shape == (3, 17, 32)
    assert output.attention is None


def test_a_feature_map_is_that_of_features_only(tmp_path, pixels):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    settings = TeacherSettings(
        kind="timm", name="test_efficientnet", weights=tmp_path / "net.pth", image_size=64, stage=3, mean=HALF, std=HALF
    )
    teacher = load_teacher(settings, CPU)
    maps = timm.create_model("test_efficientnet", features_only=True).eval()
    maps.load_state_dict({name: model.state_dict()[name] for name in maps.state_dict()})
    with torch.inference_mode():
        expected = maps(normalised(pixels))[3]
    output = teacher(pixels)
    assert (teacher.info.dim, teacher.info.rows, teacher.info.cols) == tuple(expected.shape[1:])
    torch.testing.assert_close(
        output.tokens.transpose(1, 2).unflatten(2, tuple(expected.shape[2:])), expected, rtol=1e-4, atol=1e-5
    )
    assert output.attention is None
    assert not teacher.info.class_token


def test_positions_follow_the_input_size(vit_file, pixels):
    teacher = load_teacher(vit_settings(vit_file, image_size=96), CPU)
    assert (teacher.info.rows, teacher.info.cols) == (6, 6)
    assert teacher(pixels).tokens.shape == (3, 37, teacher.info.dim)


def test_weights_come_from_the_hubs_cache(vit, vit_file, hub_cache, pixels):
    hub_cache("timm/test_vit.r160_in1k", "model.safetensors", vit.state_dict())
    fetched = load_teacher(vit_settings(None), CPU)
    given = load_teacher(vit_settings(vit_file), CPU)
    assert torch.equal(fetched(pixels).tokens, given(pixels).tokens)
    assert fetched.info.weights == given.info.weights


def test_weights_that_cannot_be_fetched_name_the_command(hub_cache):
    with pytest.raises(TeacherError, match="not cached") as refused:
        load_teacher(vit_settings(None), CPU)
    assert "`cae2pipe teachers fetch timm:test_vit`" in str(refused.value)
    assert "teacher.weights=FILE" in str(refused.value)


def test_weights_of_another_model_are_refused(vit, vit_file, tmp_path):
    state = vit.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "norm.bias"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(TeacherError, match=r"1 missing \(first: norm.bias"):
        load_teacher(vit_settings(tmp_path / "lacking.safetensors"), CPU)
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(TeacherError, match=r"1 unexpected \(first: extra.weight"):
        load_teacher(vit_settings(tmp_path / "extra.safetensors"), CPU)
    with pytest.raises(TeacherError, match="do not fit the model"):
        load_teacher(vit_settings(vit_file, name="test_vit2"), CPU)


def test_a_patch_of_another_size_is_not_resampled(vit, tmp_path):
    """timm would silently resample both the kernel and the positions."""
    other = timm.create_model("test_vit", img_size=64, patch_size=8)
    save_file(other.state_dict(), tmp_path / "patch8.safetensors")
    with pytest.raises(TeacherError, match="of another shape"):
        load_teacher(vit_settings(tmp_path / "patch8.safetensors"), CPU)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"name": "vit_tiny_patch16_242"}, "no model 'vit_tiny_patch16_242' .*nearest: 'vit_"),
        ({"name": "test_vit.mine"}, "no weights 'mine' of test_vit"),
        ({"pretrained": "mine"}, "no weights 'mine' of test_vit"),
        ({"name": "test_resnet"}, "patch tokens|not a vision transformer"),
        ({"name": "test_efficientnet", "stage": 9}, "no feature map 9"),
        ({"image_size": 72}, "not a multiple"),
        ({"quick_gelu": True}, "quick_gelu does not apply to teacher.kind timm"),
        ({"weights": Path("nowhere.pth")}, "no such weights file"),
        ({"name": "test_vit4", "weights": None}, "no pretrained weights"),
    ],
)
def test_settings_that_fit_no_model_are_refused(vit_file, over, message):
    with pytest.raises(TeacherError, match=message) as refused:
        load_teacher(vit_settings(vit_file).model_copy(update=over), CPU)
    assert refused.value.fix


def test_timm_and_open_clip_agree_on_a_real_tower(real):
    """The same trained ViT-Ti/16 under both libraries' keys, on photographs."""
    import numpy as np
    from PIL import Image

    paths = sorted((real / "imagenette" / "val").glob("*/*.JPEG"))[::101]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    weights = real / "teachers"
    a = TeacherSettings(
        kind="timm", name="vit_tiny_patch16_224", weights=weights / "vit_tiny_patch16_224.timm.safetensors"
    )
    b = TeacherSettings(
        kind="open_clip",
        name="vit-tiny",
        weights=weights / "vit_tiny_patch16_224.open_clip.safetensors",
        mean=HALF,
        std=HALF,
    )
    first, second = (load_teacher(settings, CPU)(pixels) for settings in (a, b))
    assert first.tokens.shape == (len(paths), 197, 192)
    assert float(torch.nn.functional.cosine_similarity(first.tokens, second.tokens, dim=-1).min()) > 1 - 1e-5
    torch.testing.assert_close(first.attention, second.attention, rtol=1e-3, atol=1e-5)
