from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cae2pipe.config.base import load
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.open_clip import OpenClipTeacher, resize_positions
from cae2pipe.teachers.open_clip_towers import tower_shape

CPU = torch.device("cpu")


@pytest.fixture
def settings(extract_settings) -> Callable[..., TeacherSettings]:
    """Settings of the tiny tower, some of them replaced."""

    def changed(**over: Any) -> TeacherSettings:
        return extract_settings().teacher.model_copy(update=over)

    return changed


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(teacher: OpenClipTeacher, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (teacher.info.mean, teacher.info.std))
    return (pixels.float() / 255 - mean) / std


def test_every_token_passes_the_final_norm_and_the_projection(settings, pixels):
    teacher = load_teacher(settings(), CPU)
    output = teacher(pixels)
    assert output.tokens.shape == (11, 17, 16)
    assert output.tokens.dtype == torch.float32
    tower = teacher.tower
    with torch.inference_mode():
        images = normalised(teacher, pixels)
        tower.output_tokens = True
        pooled, patches = tower(images)  # open_clip itself projects the class token only
    torch.testing.assert_close(output.tokens[:, 0], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.tokens[:, 1:], patches @ tower.proj, rtol=1e-4, atol=1e-5)


def test_attention_is_the_last_blocks_from_the_class_token(settings, pixels):
    teacher = load_teacher(settings(), CPU)
    attention = teacher(pixels).attention
    tower = teacher.tower
    with torch.inference_mode():
        x = tower._embeds(normalised(teacher, pixels))
        x = tower.transformer.resblocks[0](x)
        block = tower.transformer.resblocks[1]
        x = block.ln_1(x)
        _, expected = block.attn(x, x, x, need_weights=True, average_attn_weights=True)
    torch.testing.assert_close(attention, expected[:, 0, 1:], rtol=1e-4, atol=1e-6)


def test_the_batch_is_split_without_changing_a_token(settings, pixels):
    teacher = load_teacher(settings(), CPU)
    together = teacher(pixels)
    alone = [teacher(image.unsqueeze(0)) for image in pixels]
    torch.testing.assert_close(together.tokens, torch.cat([one.tokens for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.attention, torch.cat([one.attention for one in alone]), rtol=1e-4, atol=1e-6)


def test_a_views_size_may_differ_from_the_inputs(settings, pixels):
    teacher = load_teacher(settings(), CPU)
    larger = F.interpolate(pixels.float(), 48, mode="nearest").to(torch.uint8)
    resized = F.interpolate(larger.float(), (32, 32), mode="bicubic", antialias=True).clamp(0, 255).round()
    assert torch.equal(teacher(larger).tokens, teacher(resized.to(torch.uint8)).tokens)


def test_half_precision_stays_near_full_precision(settings, pixels):
    full = load_teacher(settings(precision="fp32"), CPU)
    half = load_teacher(settings(precision="bf16"), CPU)
    assert half.info.identity()["precision"] == "bf16"
    output = half(pixels)
    assert output.tokens.dtype == output.attention.dtype == torch.float32
    cosine = F.cosine_similarity(output.tokens, full(pixels).tokens, dim=-1)
    assert 0.999 < float(cosine.mean()) < 1 - 1e-7


def test_positions_are_interpolated_for_another_input(settings, teacher_file):
    teacher = load_teacher(settings(image_size=48), CPU)
    stored = load_file(teacher_file)["visual.positional_embedding"]
    positions = teacher.tower.positional_embedding
    assert positions.shape == (37, 32)
    assert torch.equal(positions[0], stored[0])
    expected = F.interpolate(stored[1:].T.reshape(1, 32, 4, 4), (6, 6), mode="bilinear", antialias=False)
    torch.testing.assert_close(positions[1:].T.reshape(1, 32, 6, 6), expected)
    assert (teacher.info.rows, teacher.info.cols) == (6, 6)
    assert teacher(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).tokens.shape == (2, 37, 16)


def test_a_linear_ramp_of_positions_keeps_its_slope():
    """Bilinear, corners not aligned: 16 cells to 14, as for ViT-L/14 at 196 pixels."""
    ramp = (torch.arange(16.0) + 0.5) / 16
    patches = ramp.view(16, 1, 1).expand(16, 16, 3).reshape(256, 3)
    resized = resize_positions(torch.cat([torch.full((1, 3), 7.0), patches]), (14, 14))
    assert torch.equal(resized[0], torch.full((3,), 7.0))
    rows = resized[1:].reshape(14, 14, 3)[:, 0, 0]
    torch.testing.assert_close(rows, (torch.arange(14.0) + 0.5) / 14)


def test_identity_holds_what_changes_the_latents_and_no_path(settings, teacher_file, tmp_path):
    identity = load_teacher(settings(), CPU).info.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert str(teacher_file.parent) not in json.dumps(identity)
    copy = tmp_path / "copy.pt"
    torch.save(load_file(teacher_file), copy)
    assert load_teacher(settings(weights=copy), CPU).info.identity() == identity
    for change in ({"quick_gelu": True}, {"mean": (0.5, 0.5, 0.5)}, {"precision": "bf16"}, {"image_size": 48}):
        assert load_teacher(settings(**change), CPU).info.identity() != identity, change
    changed = load_file(teacher_file)
    changed["visual.proj"][0, 0] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    assert load_teacher(settings(weights=tmp_path / "changed.safetensors"), CPU).info.weights != identity["weights"]


def test_a_files_metadata_can_describe_its_tower(settings, teacher_file, tmp_path, pixels):
    described = tmp_path / "described.safetensors"
    known = settings()
    save_file(
        load_file(teacher_file),
        described,
        metadata={"vision_cfg": json.dumps(known.vision_cfg), "embed_dim": "16", "quick_gelu": "false"},
    )
    bare = settings(weights=described, vision_cfg=None, embed_dim=None, quick_gelu=None)
    assert torch.equal(load_teacher(bare, CPU)(pixels).tokens, load_teacher(known, CPU)(pixels).tokens)
    save_file(load_file(teacher_file), described, metadata={"vision_cfg": "{", "embed_dim": "16"})
    with pytest.raises(TeacherError, match="metadata does not describe a tower"):
        load_teacher(bare, CPU)


def test_a_files_metadata_gives_the_activation_of_a_known_model_too(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"quick_gelu": "true"})
    known = TeacherSettings(kind="open_clip", name="ViT-B-16", weights=file)
    assert tower_shape(known)["quick_gelu"] is True
    for over in ({"quick_gelu": False}, {"output": "raw"}, {"pretrained": "laion2b_s34b_b88k"}):
        assert tower_shape(known.model_copy(update=over))["quick_gelu"] is False


@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_layers_are_the_models_own_hidden_states_after_norm_and_projection(settings, pixels, layers):
    teacher = load_teacher(settings(layers=layers), CPU)
    plain, tower = load_teacher(settings(), CPU), teacher.tower
    output = teacher(pixels)
    with torch.inference_mode():
        x = tower._embeds(normalised(teacher, pixels))
        for number, block in enumerate(tower.transformer.resblocks, start=1):
            x = block(x)
            if number in layers:
                expected = tower.ln_post(x) @ tower.proj
                torch.testing.assert_close(output.layers[number], expected, rtol=1e-5, atol=1e-5)
    assert tuple(output.layers) == layers
    torch.testing.assert_close(output.tokens, plain(pixels).tokens, rtol=1e-5, atol=1e-5)


def test_the_wrong_activation_is_refused_by_name(settings):
    named = TeacherSettings(kind="open_clip", name="ViT-B-16", pretrained="openai")
    with pytest.raises(TeacherError, match="QuickGELU") as refused:
        load_teacher(named, CPU)
    assert "teacher.name=ViT-B-16-quickgelu" in str(refused.value)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"vision_cfg": None, "name": "ViT-B-61"}, "open_clip has no model 'ViT-B-61' .*nearest: 'ViT-B-"),
        ({"vision_cfg": None, "name": "hf-hub:a/b"}, "open_clip has no model"),
        ({"vision_cfg": {"width": 32, "depth": 2}}, "cannot build this tower"),
        ({"vision_cfg": {"width": 32, "head_width": 0}}, "cannot build this tower"),
        ({"vision_cfg": {"patch_size": [8, 8]}}, "patch_size"),
        ({"embed_dim": None}, "projection's width"),
        ({"image_size": 36}, "not a multiple"),
        ({"weights": None}, "neither teacher.weights nor teacher.pretrained"),
        ({"weights": None, "pretrained": "mine"}, "has no weights 'mine'"),
        ({"stage": 3}, "no feature maps to choose from"),
        ({"layers": (3,)}, "has no block 3, only 1 to 2"),
        ({"weights": Path("nowhere.safetensors"), "vision_cfg": None}, "no such weights file"),
    ],
)
def test_settings_that_fit_no_tower_are_refused(settings, over, message):
    with pytest.raises(TeacherError, match=message) as refused:
        load_teacher(settings(**over), CPU)
    assert refused.value.fix


@pytest.mark.parametrize("preset", ["clip-b16", "clip-l14", "clip-l14-196"])
def test_presets_name_weights_that_open_clip_knows(preset, hub_cache):
    """Without the weights a preset gets as far as the hub's cache, and says how to fill it."""
    with pytest.raises(TeacherError, match="not cached") as refused:
        load_teacher(load(ExtractSettings, "extract", preset).teacher, CPU)
    assert f"teachers fetch {preset}`" in str(refused.value)


def test_pretrained_weights_come_from_the_hubs_cache(settings, teacher_file, pixels, hub_cache, monkeypatch):
    """A tower by name and tag with cached weights: no network. The file contains a text tower, which is not built."""
    import open_clip.factory
    import open_clip.pretrained

    state = load_file(teacher_file) | {"text_projection": torch.zeros(2, 2), "logit_scale": torch.ones([])}
    hub_cache("some/repository", "open_clip_model.safetensors", state)
    tiny = {"embed_dim": 16, "vision_cfg": settings().vision_cfg, "text_cfg": {}, "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", tiny)
    tag = {"hf_hub": "some/repository/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    teacher = load_teacher(TeacherSettings(kind="open_clip", name="tiny", pretrained="mine", image_size=32), CPU)
    assert teacher.info.mean == (0.1, 0.2, 0.3)
    same = load_teacher(settings(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), CPU)
    assert torch.equal(teacher(pixels).tokens, same(pixels).tokens)
    assert teacher.info.identity() == same.info.identity()
