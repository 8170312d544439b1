"""A student that starts from the weights of a timm model computes what that model computes."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.images.normalise import Normalise
from cae2pipe.models.encoder import build_encoder
from cae2pipe.models.export import student_normalise, timm_config, timm_state
from cae2pipe.models.initial_weights import encoder_weights

SETTINGS = ModelSettings(width=32, depth=2, heads=2, image_size=32, patch_size=8)
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def vit(name: str = "vit_tiny_patch16_224", **over) -> nn.Module:
    """A small model whose weights are all random, biases and scales included."""
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, **{**SHAPE, **over})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def student(model: nn.Module, mean=IMAGENET[0], std=IMAGENET[1], settings: ModelSettings = SETTINGS):
    """The encoder that starts from it, and the notes."""
    weights = encoder_weights(model, settings, mean=mean, std=std, where="test")
    encoder = build_encoder(settings)
    missing = encoder.load_state_dict(weights.state, strict=False)
    assert not missing.unexpected_keys
    return encoder.eval(), weights.notes, missing.missing_keys


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"init_values": 1e-5},
        {"qkv_bias": False},
        {"no_embed_class": True},
        {"global_pool": "avg", "fc_norm": True},
        {"img_size": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("normalisation", [IMAGENET, ((0.5, 0.4, 0.6), (0.5, 0.3, 0.4))], ids=["imagenet", "own"])
@torch.no_grad()
def test_features_are_those_of_the_model(over, normalisation):
    model = vit(**over)
    encoder, notes, missing = student(model, *normalisation)
    assert (notes, missing) == ([], [])
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    model.set_input_size(img_size=(32, 32))
    wanted = model.forward_features(Normalise(*normalisation)(pixels))
    if isinstance(model.norm, nn.Identity):
        wanted = model.fc_norm(wanted)
    torch.testing.assert_close(encoder(student_normalise()(pixels)), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_class_token_that_is_missing_is_drawn_and_registers_are_dropped():
    encoder, notes, missing = student(vit(class_token=False, global_pool="avg"))
    assert (missing, notes) == (["cls_token"], ["it has no class token, so the student's is drawn"])
    assert not encoder.pos_embed[0, 0].any()
    model = vit(reg_tokens=4, no_embed_class=True)
    encoder, notes, missing = student(model)
    assert (missing, notes) == ([], ["its 4 register tokens are dropped, as the student has none"])
    torch.testing.assert_close(encoder.pos_embed[:, 1:], model.pos_embed)


@torch.no_grad()
def test_another_epsilon_of_the_norms_is_noted():
    model = vit(norm_layer=partial(nn.LayerNorm, eps=1e-5))
    encoder, notes, missing = student(model)
    assert (missing, notes) == (
        [], ["the epsilon of its norms is 1e-05, the student's 1e-06, so features differ slightly"]
    )  # fmt: skip
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    wanted = model.forward_features(Normalise(*IMAGENET)(pixels))
    torch.testing.assert_close(encoder(student_normalise()(pixels)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: vit(embed_dim=48, depth=3), "width 48, the student 32; depth 3, the student 2"),
        (lambda: vit(num_heads=4), "heads 4"),
        (lambda: vit(patch_size=4), "patch_size 4"),
        (lambda: vit(mlp_ratio=2), "2 times as wide"),
        (lambda: vit(act_layer="quick_gelu"), "QuickGELU"),
        (lambda: vit(act_layer="gelu_tanh"), "exact GELU"),
        (lambda: vit(pre_norm=True), "a norm before its blocks"),
        (lambda: vit(qk_norm=True), "normalises q and k"),
        (lambda: vit(final_norm=False), "no final norm"),
        (lambda: vit(pos_embed="none"), "no absolute positions"),
        (lambda: vit(mlp_layer=timm.layers.SwiGLUPacked), "its MLP is GluMlp"),
        (lambda: vit(norm_layer=timm.layers.RmsNorm), "not LayerNorm"),
        (lambda: vit("vit_small_patch16_dinov3"), "rotary positions"),
        (lambda: timm.create_model("resnet18"), "it is a ResNet"),
        (lambda: vit("deit_tiny_distilled_patch16_224"), "VisionTransformerDistilled"),
    ],
)
def test_what_the_student_cannot_be_is_named(model, said):
    with pytest.raises(SettingsError, match=said):
        student(model())


def test_the_fix_gives_a_student_that_fits():
    model = vit(embed_dim=48, depth=3, num_heads=4, patch_size=4)
    with pytest.raises(SettingsError) as caught:
        student(model)
    assert caught.value.fix == ("--set model.width=48 --set model.depth=3 --set model.heads=4 --set model.patch_size=4")
    student(model, settings=ModelSettings(width=48, depth=3, heads=4, patch_size=4, image_size=32))


@torch.no_grad()
def test_rotary_positions_go_on():
    settings = SETTINGS.model_copy(update={"rotary_positions": True})
    donor = build_encoder(settings).eval()
    config = timm_config(donor)
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    model.load_state_dict(timm_state(donor))
    encoder, notes, missing = student(model, settings=settings)
    pixels = torch.randn(2, 3, 32, 32)
    assert (notes, missing) == ([], [])
    torch.testing.assert_close(encoder(pixels), donor(pixels), rtol=1e-4, atol=1e-5)
    _, (note,), _ = student(model, settings=settings.model_copy(update={"image_size": 64}))
    assert note.startswith("its rotary positions span 4 patches, the student's 8")
    for donated, given, said, value in (
        (model, SETTINGS, "these weights have rotary positions, the student none", "true"),
        (vit(), settings, "the student has rotary positions, these weights none", "false"),
    ):
        with pytest.raises(SettingsError, match=said) as caught:
            student(donated, settings=given)
        assert caught.value.fix == f"--set model.rotary_positions={value}"


@torch.no_grad()
def test_relative_positions_go_on():
    settings = SETTINGS.model_copy(update={"relative_positions": True})
    donor = build_encoder(settings).eval()
    for block in donor.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    config = timm_config(donor)
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    model.load_state_dict(timm_state(donor))
    encoder, _, missing = student(model, settings=settings)
    pixels = torch.randn(2, 3, 32, 32)
    assert missing == []
    torch.testing.assert_close(encoder(pixels), donor(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(SettingsError, match="have relative positions, the student none") as caught:
        student(model)
    assert caught.value.fix == "--set model.relative_positions=true"
    # A plain ViT leaves the tables at zero.
    assert all("table" in name for name in student(vit(), settings=settings)[2])
