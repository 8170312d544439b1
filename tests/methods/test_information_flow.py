"""What the predictions of each method depend on: masked pixels are changed, and outputs compared."""

from __future__ import annotations

import pytest
import torch

from cae2pipe.config.pretrain import LossSettings, ModelSettings
from cae2pipe.methods.losses import alignment_loss
from cae2pipe.methods.method import Method
from cae2pipe.methods.registry import METHODS, build_method

DIM = 10
VISIBLE = torch.tensor([[0, 3, 5, 7, 8, 9, 12, 13, 14, 15], [1, 2, 3, 4, 5, 6, 10, 11, 14, 15]])
MASKED = torch.tensor([[1, 2, 4, 6, 10, 11], [0, 7, 8, 9, 12, 13]])
PARTS = ("class_token", "visible", "masked")
SEES_MASKED = {"caev2": False, "cae": False, "mvp": False, "mae": False, "milan": False, "fd": True}
"""Methods that see masked patches; ``masks`` must be False."""


def build(name: str, **over) -> Method:
    torch.manual_seed(0)
    small = {
        "width": 24,
        "depth": 2,
        "heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "drop_path": 0.5,
        "predictor_depth": 2,
        "predictor_width": 12,
        "predictor_heads": 2,
        "layer_scale": 1.0,
        "predictor_layer_scale": 1.0,
    }
    return build_method(name, ModelSettings.model_validate(small | over), DIM)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def changed(pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Pixels with other values in the given patches."""
    other = pixels.clone()
    for sample, own in enumerate(patches.tolist()):
        for patch in own:
            other[sample, :, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = 9
    return other


def test_every_method_is_tested_here():
    assert SEES_MASKED.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_masked_pixels_reach_predictions_only_where_nothing_is_masked(name, pixels):
    model = build(name).eval()
    before, after = (model(images, VISIBLE, MASKED) for images in (pixels, changed(pixels, MASKED)))
    for part in PARTS:
        assert torch.equal(getattr(before, part), getattr(after, part)) is not SEES_MASKED[name], part
    assert model.masks is not SEES_MASKED[name]


@pytest.mark.parametrize("name", METHODS)
def test_visible_pixels_reach_all_predictions(name, pixels):
    model = build(name).eval()
    before, after = (model(images, VISIBLE, MASKED) for images in (pixels, changed(pixels, VISIBLE[:, :1])))
    for part in PARTS:
        assert not torch.allclose(getattr(before, part), getattr(after, part)), part


@pytest.mark.parametrize("name", METHODS)
def test_what_is_predicted_of_masked_patches_reaches_the_encoders_own_tokens_only_inside_it(name, pixels):
    """CAE v2, MAE, MILAN: the encoder's tokens do not depend on masked positions; in BEiT both are updated together."""
    model = build(name).eval()
    other = MASKED.roll(1, dims=0)
    rest = torch.stack([torch.tensor([p for p in range(16) if p not in own.tolist()]) for own in other])
    if name in ("caev2", "cae", "mae", "milan"):
        seen = model.encoder(pixels, VISIBLE)
        assert seen.shape[1] == 1 + VISIBLE.shape[1]
    else:
        before, after = model(pixels, VISIBLE, MASKED), model(pixels, rest, other)
        assert torch.allclose(before.class_token, after.class_token) is (name == "fd")


@pytest.mark.parametrize("name", METHODS)
def test_every_stack_has_columns_of_its_own_in_the_order_it_was_set(name):
    """The uniforms of drop path, and so the losses of a run, depend on it."""
    model = build(name, depth=3)
    stacks = [part for part in (getattr(model, each, None) for each in ("encoder", "regressor", "decoder")) if part]
    drop = torch.arange(2 * model.drop_columns).reshape(2, -1)
    shares = model.split_drop(drop)
    assert [share.shape[1] for share in shares] == [2 * len(stack.blocks) for stack in stacks]
    assert torch.equal(torch.cat(shares, dim=1), drop)
    assert model.split_drop(None) == [None] * len(stacks)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_drops_nothing(name, pixels):
    model = build(name).eval()
    dropped, plain = (model(pixels, VISIBLE, MASKED, drop) for drop in (torch.zeros(2, model.drop_columns), None))
    assert torch.equal(dropped.visible, plain.visible)
    assert torch.equal(dropped.masked, plain.masked)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_trained_and_drop_path_is_drawn_from_outside(name, pixels):
    model = build(name).train()
    drop = torch.rand(2, model.drop_columns, generator=torch.Generator().manual_seed(2))
    kept = torch.full_like(drop, 0.99)
    prediction = model(pixels, VISIBLE, MASKED, kept)
    assert not torch.allclose(model(pixels, VISIBLE, MASKED, drop * 0).masked, prediction.masked)
    assert torch.equal(model(pixels, VISIBLE, MASKED, kept).masked, prediction.masked)
    target = torch.randn(2, 17, DIM, generator=torch.Generator().manual_seed(3))
    alignment_loss(
        prediction, target, VISIBLE, masked=MASKED, settings=LossSettings(), weights=torch.ones(2), has_class_token=True
    ).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_caes_alignment_and_decoder_read_the_regressor_behind_its_norm(pixels):
    model = build("cae", predictor_norm=True).eval()
    read = []
    model.regressor.blocks[-1].register_forward_hook(lambda module, inputs, output: read.append(output))
    model.decoder.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    with torch.no_grad():
        model.regressor.norm.weight.mul_(2).add_(torch.linspace(0, 1, 12))
        found = model(pixels, VISIBLE, MASKED).extra
    norm = model.regressor.norm
    wanted = torch.nn.functional.layer_norm(read[0], (12,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(read[1], wanted)
    own = model.bridge(model.encoder(pixels, MASKED))[:, 1:]
    torch.testing.assert_close(found, 2 * (wanted - own).square().mean(dim=-1))


def test_caes_alignment_alone_sees_masked_pixels_and_gives_the_encoder_no_gradient_for_them(pixels):
    model = build("cae", drop_path=0.0).train()
    before, after = (model(images, VISIBLE, MASKED) for images in (pixels, changed(pixels, MASKED)))
    assert before.extra.shape == MASKED.shape
    assert not torch.allclose(before.extra, after.extra)
    # The target is the encoder's output for the masked patches, as a constant.
    own = model.bridge(model.encoder(pixels, MASKED))[:, 1:]
    latents = model.regressor(model.bridge(model.encoder(pixels, VISIBLE))[:, 1:], VISIBLE, MASKED)
    torch.testing.assert_close(before.extra, 2 * (latents - own).square().mean(dim=-1))
    loss = alignment_loss(
        before,
        torch.zeros(2, 17, DIM),
        VISIBLE,
        masked=MASKED,
        settings=LossSettings(),
        weights=torch.ones(2),
        has_class_token=True,
    )
    terms = loss.visible + loss.masked + before.extra.mean()
    torch.testing.assert_close(loss.total, terms)


@pytest.mark.parametrize(("name", "updates"), [("mae", True), ("milan", False)])
def test_only_maes_decoder_updates_visible_latents(name, updates, pixels):
    """Predictions of visible patches depend on the mask tokens in MAE; in MILAN they do not."""
    model = build(name).eval()
    before = model(pixels, VISIBLE, MASKED)
    with torch.no_grad():
        model.decoder.mask_token[..., 0] += 1
    after = model(pixels, VISIBLE, MASKED)
    assert torch.equal(before.visible, after.visible) is not updates
    assert torch.equal(before.class_token, after.class_token) is not updates
    assert not torch.allclose(before.masked, after.masked)


@pytest.mark.parametrize("name", METHODS)
def test_predictions_stand_in_the_places_of_their_patches(name, pixels):
    """The order in which patches are listed does not change their latents."""
    model = build(name).eval()
    order_v, order_m = torch.randperm(10), torch.randperm(6)
    plain, mixed = model(pixels, VISIBLE, MASKED), model(pixels, VISIBLE[:, order_v], MASKED[:, order_m])
    torch.testing.assert_close(mixed.visible, plain.visible[:, order_v], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.masked, plain.masked[:, order_m], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_activations_change_nothing(name, pixels):
    gradients = []
    for again in (False, True):
        model = build(name, drop_path=0.0).train()
        model.recompute(again)
        prediction = model(pixels, VISIBLE, MASKED)
        (prediction.masked.sum() + prediction.visible.square().sum()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)
