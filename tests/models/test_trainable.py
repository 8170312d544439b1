"""Changes of timm's model before training on labels: the function is preserved, every parameter is trained."""

from __future__ import annotations

import pytest
import timm
import torch

from cae2pipe.errors import SettingsError
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import timm_config, timm_state
from cae2pipe.models.formats import folded
from cae2pipe.models.trainable import (
    add_relative_positions,
    add_rotary_positions,
    check_trainable,
    freeze_fixed_positions,
    layer_decay_groups,
    plain_vit,
    resize_input,
    set_classifier,
    set_drop_path,
    take_any_size,
    unfold_layer_scale,
)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(width=32, depth=3, heads=2, image_size=32, patch_size=8)
    with torch.no_grad():
        for block in encoder.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.uniform_(0.05, 0.5)
    return encoder


@pytest.fixture
def model(encoder):
    return build_vit(timm_config(encoder), timm_state(encoder))


@pytest.fixture
def older(encoder):
    """The model of an encoder written by an older version."""
    config = timm_config(encoder)
    del config["model_args"]["init_values"]
    return build_vit(config, folded(timm_state(encoder)))


def build_vit(config, state):
    built = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    built.load_state_dict(state)
    return built.eval()


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_learnt_layer_scale_is_what_training_starts_from(model, encoder):
    unfold_layer_scale(model, 0.5)
    for block, ours in zip(model.blocks, encoder.blocks, strict=True):
        assert torch.equal(block.ls1.gamma, ours.ls1.gamma)
        assert torch.equal(block.mlp.fc2.weight, ours.mlp.fc2.weight)


@torch.no_grad()
def test_folded_layer_scale_unfolds_into_the_same_function(model, older):
    wanted = model.forward_features(PIXELS)
    torch.testing.assert_close(older.forward_features(PIXELS), wanted, rtol=1e-4, atol=1e-5)
    unfold_layer_scale(older, 0.1)
    torch.testing.assert_close(older.forward_features(PIXELS), wanted, rtol=1e-4, atol=1e-5)
    assert all(float(block.ls2.gamma.mean()) == pytest.approx(0.1) for block in older.blocks)


@pytest.fixture
def related() -> Encoder:
    """An encoder that was trained with relative positions."""
    torch.manual_seed(0)
    encoder = Encoder(width=32, depth=3, heads=2, image_size=32, patch_size=8, relative_positions=True).eval()
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
        torch.nn.init.normal_(block.attn.q_bias)
    return encoder


@torch.no_grad()
def test_learnt_relative_positions_are_what_training_starts_from(related):
    """At the encoder's own size in any case; at another, biases of near patches stay."""
    exported = build_vit(timm_config(related), timm_state(related))
    model, tables, reach = plain_vit(exported)
    assert reach is None
    check_trainable(model, "here")
    add_relative_positions(model, "here", tables)
    torch.testing.assert_close(model.forward_features(PIXELS), related(PIXELS), rtol=1e-4, atol=1e-5)
    larger = plain_vit(exported).model
    resize_input(larger, 64)
    add_relative_positions(larger, "here", tables)
    found = larger.blocks[1].attn.relative_positions.relative_position_bias_table[:-3].view(15, 15, 2)
    wanted = tables[1][:-3].view(7, 7, 2)
    torch.testing.assert_close(found[6:9, 6:9], wanted[2:5, 2:5], rtol=1e-4, atol=1e-4)
    assert torch.equal(larger.blocks[1].attn.relative_positions.relative_position_bias_table[-3:], tables[1][-3:])
    assert plain_vit(model) == (model, None, None)


def test_images_of_any_size_have_learnt_relative_positions(related):
    """As in detection. An image of the encoder's own size is seen as before; tables are trained at any size."""
    model, tables, _ = plain_vit(build_vit(timm_config(related), timm_state(related)))
    add_relative_positions(model, "here", tables)
    take_any_size(model, 30)  # no smaller than the encoder's own
    torch.testing.assert_close(model.forward_features(PIXELS), related(PIXELS), rtol=1e-4, atol=1e-5)
    model, tables, _ = plain_vit(build_vit(timm_config(related), timm_state(related)))
    add_relative_positions(model, "here", tables)
    take_any_size(model, 60)
    table = model.blocks[0].attn.relative_positions.relative_position_bias_table
    assert table.shape == (15 * 15 + 3, 2)
    for side in (40, 60):
        features = model.forward_features(torch.randn(1, 3, 32, side))
        assert features.shape == (1, 1 + 4 * -(-side // 8), 32)
        features.square().sum().backward()
    touched = table.grad[:-3].view(15, 15, 2).abs().sum(dim=2) > 0
    # Four rows of patches have offsets of up to 3, eight columns of up to 7.
    assert touched[4:11].all()
    assert not touched[:4].any()


@pytest.fixture
def rotary() -> Encoder:
    """An encoder that was trained with rotary positions."""
    torch.manual_seed(0)
    encoder = Encoder(width=32, depth=3, heads=2, image_size=32, patch_size=8, rotary_positions=True).eval()
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.q_bias)
    return encoder


@torch.no_grad()
def test_rotary_positions_stay_with_and_without_relative_ones_and_span_a_larger_grid(rotary):
    exported = build_vit(timm_config(rotary), timm_state(rotary))
    wanted = rotary(PIXELS)
    assert not torch.allclose(wanted, Encoder(width=32, depth=3, heads=2, image_size=32, patch_size=8)(PIXELS))
    model, tables, reach = plain_vit(exported)
    assert (tables, reach) == (None, 4)
    check_trainable(model, "here")
    add_rotary_positions(model, reach)
    torch.testing.assert_close(model.forward_features(PIXELS), wanted, rtol=1e-4, atol=1e-5)
    add_relative_positions(model, "here")
    torch.testing.assert_close(model.forward_features(PIXELS), wanted, rtol=1e-4, atol=1e-5)
    # At another size as timm computes it.
    larger = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    model = plain_vit(exported).model
    resize_input(model, 64)
    add_rotary_positions(model, reach)
    exported.set_input_size((64, 64))
    torch.testing.assert_close(model.forward_features(larger), exported.forward_features(larger), rtol=1e-4, atol=1e-5)


def test_images_of_any_size_have_rotary_positions(rotary):
    """As in detection: each image is seen as by an encoder of its size, and all is trained."""
    model, _, reach = plain_vit(build_vit(timm_config(rotary), timm_state(rotary)))
    add_rotary_positions(model, reach)
    add_relative_positions(model, "here")
    take_any_size(model, 64)
    torch.testing.assert_close(model.forward_features(PIXELS), rotary(PIXELS), rtol=1e-4, atol=1e-5)
    images = torch.randn(2, 3, 64, 64)
    exported = build_vit(timm_config(rotary), timm_state(rotary))
    exported.set_input_size((64, 64))
    torch.testing.assert_close(model.forward_features(images), exported.forward_features(images), rtol=1e-3, atol=1e-4)
    model.requires_grad_(True)
    model.forward_features(torch.randn(1, 3, 40, 30)).square().sum().backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_other_rotary_models_are_left_as_they_are():
    config = timm_config(Encoder(width=32, depth=1, heads=2, image_size=32, patch_size=8, rotary_positions=True))
    others = {"ref_feat_shape": None, "rope_temperature": 99.0, "rope_grid_offset": 1.0, "mlp_ratio": 3}
    for name, value in others.items():
        arguments = {**config["model_args"], name: value}
        eva = timm.create_model(config["architecture"], num_classes=0, **arguments)
        assert plain_vit(eva) == (eva, None, None)


@torch.no_grad()
def test_relative_positions_are_zero_at_first_and_then_matter(model):
    wanted = model.forward_features(PIXELS)
    add_relative_positions(model, "here")
    torch.testing.assert_close(model.forward_features(PIXELS), wanted)
    table = model.blocks[1].attn.relative_positions.relative_position_bias_table
    # (2 rows - 1)(2 cols - 1) offsets, and three for the class token.
    assert table.shape == (7 * 7 + 3, 2)
    table[0, 0] = 5.0
    assert not torch.allclose(model.forward_features(PIXELS), wanted)


@torch.no_grad()
def test_the_classifier_reads_the_mean_patch_through_the_final_norm(model):
    model.norm.weight.uniform_(0.5, 2)
    norm, tokens = model.norm, model.forward_features(PIXELS)
    set_classifier(model, 5, 0.001)
    assert isinstance(model.norm, torch.nn.Identity)
    assert model.fc_norm is norm
    raw = model.forward_features(PIXELS)
    torch.testing.assert_close(model(PIXELS), model.head(norm(raw[:, 1:].mean(dim=1))))
    torch.testing.assert_close(norm(raw), tokens)
    assert float(model.head.weight.std()) == pytest.approx(0.02 * 0.001, rel=0.2)


def test_drop_path_rises_linearly(model):
    set_drop_path(model, 0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


def trainable(model):
    freeze_fixed_positions(model)
    unfold_layer_scale(model, 0.1)
    set_classifier(model, 5, 1.0)
    set_drop_path(model, 0.0)
    add_relative_positions(model, "here")
    return model


def test_every_parameter_has_the_learning_rate_of_its_layer(model):
    model = trainable(model)
    groups = layer_decay_groups(model, 0.05, 0.75)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert scale.keys() == {id(p) for p in named.values()}
    for name, parameter in named.items():
        # By hand: embeddings 0, blocks 1 to 3, norm and head 4 of L + 1 = 4.
        layer = 4 if name.split(".")[0] in ("fc_norm", "head") else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
        assert scale[id(parameter)] == pytest.approx(0.75 ** (4 - layer)), name
        bare = parameter.ndim <= 1 or name == "cls_token"
        assert decay[id(parameter)] == (0.0 if bare else 0.05), name
    assert len(set(scale.values())) == 5
    assert decay[id(model.blocks[0].attn.relative_positions.relative_position_bias_table)] == 0.05


def test_every_parameter_gets_a_gradient_but_fixed_positions(model):
    model = trainable(model).train()
    assert not model.pos_embed.requires_grad
    torch.nn.functional.cross_entropy(model(PIXELS), torch.tensor([0, 4])).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_learned_positions_are_trained_on():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    freeze_fixed_positions(model)
    assert model.pos_embed.requires_grad


def test_another_input_size(model):
    resize_input(model, 48)
    add_relative_positions(model, "here")
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    with pytest.raises(SettingsError, match="not a multiple") as caught:
        resize_input(model, 50)
    assert caught.value.fix == "--set image_size=48"


@pytest.mark.parametrize("name", ["resnet18", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_gap_224"])
def test_what_can_be_fine_tuned(name):
    built = timm.create_model(name, num_classes=0)
    if name.startswith("vit_"):
        check_trainable(built, name)
        set_classifier(built, 3, 1.0)
    else:
        with pytest.raises(SettingsError, match="cannot be fine-tuned"):
            check_trainable(built, name)


def test_more_tokens_before_the_patches_have_no_relative_positions():
    built = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0)
    with pytest.raises(SettingsError, match="this model has 2"):
        add_relative_positions(built, "deit")


def test_weights_under_bfloat16_see_the_bias_too(model):
    model = trainable(model)
    with torch.no_grad():
        model.blocks[0].attn.relative_positions.relative_position_bias_table.normal_()
        wanted = model(PIXELS)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(PIXELS)
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.05)
