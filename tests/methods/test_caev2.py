import pytest
import torch

from cae2pipe.config.base import load
from cae2pipe.config.pretrain import LossSettings, ModelSettings, PretrainSettings
from cae2pipe.methods.caev2 import CAEv2
from cae2pipe.methods.losses import alignment_loss

DIM = 10
VISIBLE = torch.tensor([[0, 3, 5, 7, 8, 9, 12, 13, 14, 15], [1, 2, 3, 4, 5, 6, 10, 11, 14, 15]])
MASKED = torch.tensor([[1, 2, 4, 6, 10, 11], [0, 7, 8, 9, 12, 13]])


def shape(**over) -> ModelSettings:
    small = {
        "width": 24,
        "depth": 2,
        "heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "drop_path": 0.5,
        "predictor_depth": 2,
        "predictor_width": 24,
        "predictor_heads": 2,
        "layer_scale": 1.0,
        "predictor_layer_scale": 1.0,
    }
    return ModelSettings.model_validate(small | over)


def build(**over) -> CAEv2:
    torch.manual_seed(0)
    return CAEv2(shape(**over), DIM)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "dim", "total", "encoder"),
    [
        ("tiny", 512, 5.67, 5.49),
        ("small", 512, 23.57, 21.59),
        ("base", 512, 114.42, 85.66),
        ("large", 768, 354.26, 303.12),
    ],
)
def test_parameters_of_the_official_recipe(size, dim, total, encoder):
    settings = load(PretrainSettings, "pretrain", size, overrides=["recipe=official"]).model
    with torch.device("meta"):
        model = CAEv2(settings, dim)
    # The released code's totals count a final norm of the regressor that it never uses, and no fixed positions.
    unused = 2 * settings.predictor_width
    parameters = sum(parameter.numel() for parameter in model.parameters()) + unused
    assert round(parameters / 1e6, 2) == total
    assert round(sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6, 2) == encoder


def test_larges_regressor_has_twelve_heads_of_85_features():
    settings = load(PretrainSettings, "pretrain", "large", overrides=["recipe=official"]).model
    with torch.device("meta"):
        model = CAEv2(settings, 768)
    assert model.regressor.blocks[0].attn.q.weight.shape == (1020, 1024)


def test_heads_without_features_are_refused():
    with pytest.raises(ValueError, match=r"model\.predictor_heads to at most 12"):
        shape(predictor_width=12, predictor_heads=13)
    assert shape(predictor_width=12, predictor_heads=13, predictor_depth=0).predictor_depth == 0


def test_shapes(pixels):
    prediction = build()(pixels, VISIBLE, MASKED)
    assert prediction.class_token.shape == (2, 1, DIM)
    assert prediction.visible.shape == (2, 10, DIM)
    assert prediction.masked.shape == (2, 6, DIM)


def test_the_head_is_linear_then_norm_in_the_paper(pixels):
    model = build(head="fc-ln")
    linear, norm = model.head
    assert (type(linear).__name__, type(norm).__name__, norm.eps) == ("Linear", "LayerNorm", 1e-6)
    prediction = model(pixels, VISIBLE, MASKED)
    for tokens in (prediction.class_token, prediction.visible, prediction.masked):
        torch.testing.assert_close(tokens.mean(dim=-1), torch.zeros(tokens.shape[:2]), rtol=0, atol=1e-5)


def test_the_head_is_norm_then_linear_in_the_released_code(pixels):
    model = build(head="ln-fc")
    norm, linear = model.head
    assert (type(norm).__name__, type(linear).__name__, norm.eps) == ("LayerNorm", "Linear", 1e-6)
    tokens = model.encoder(pixels, VISIBLE)
    wanted = linear(torch.nn.functional.layer_norm(tokens, (24,), eps=1e-6))
    prediction = model.eval()(pixels, VISIBLE, MASKED)
    torch.testing.assert_close(torch.cat([prediction.class_token, prediction.visible], dim=1), wanted)


@pytest.mark.parametrize("width", [24, 12])
def test_one_head_serves_encoder_and_regressor(pixels, width):
    """If their widths differ (Tiny), a Linear and a norm are between the encoder and both."""
    model = build(predictor_width=width).eval()
    tokens = model.encoder(pixels, VISIBLE)
    if width == 12:
        linear, norm = model.bridge
        tokens = norm(linear(tokens))
        assert norm.eps == 1e-6
    else:
        assert not list(model.bridge.parameters())
    prediction = model(pixels, VISIBLE, MASKED)
    torch.testing.assert_close(prediction.class_token, model.head(tokens[:, :1]))
    torch.testing.assert_close(prediction.visible, model.head(tokens[:, 1:]))
    torch.testing.assert_close(prediction.masked, model.head(model.regressor(tokens[:, 1:], VISIBLE, MASKED)))


def test_the_regressor_sees_no_class_token_and_changes_nothing_visible(pixels):
    model = build().eval()
    before = model(pixels, VISIBLE, MASKED)

    def other_class_token(module, inputs, tokens):
        return torch.cat([tokens[:, :1] + 5 * torch.randn_like(tokens[:, :1]), tokens[:, 1:]], dim=1)

    handle = model.encoder.register_forward_hook(other_class_token)
    after = model(pixels, VISIBLE, MASKED)
    handle.remove()
    assert not torch.allclose(after.class_token, before.class_token)
    assert torch.equal(after.masked, before.masked)
    with torch.no_grad():
        for parameter in model.regressor.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = model(pixels, VISIBLE, MASKED)
    assert not torch.allclose(after.masked, before.masked)
    assert torch.equal(after.visible, before.visible)


def test_masked_pixels_reach_no_prediction(pixels):
    model = build().eval()
    changed = pixels.clone()
    for sample, patches in enumerate(MASKED.tolist()):
        for patch in patches:
            changed[sample, :, patch // 4 * 8 : patch // 4 * 8 + 8, patch % 4 * 8 : patch % 4 * 8 + 8] = 9
    before, after = model(pixels, VISIBLE, MASKED), model(changed, VISIBLE, MASKED)
    for name in ("class_token", "visible", "masked"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_drop_path_takes_the_encoders_columns_then_the_regressors(pixels):
    model = build()
    assert model.drop_columns == 4 + 4
    kept = torch.full((2, 8), 0.99)
    whole = model(pixels, VISIBLE, MASKED, kept)
    regressor = kept.clone()
    regressor[:, 6:] = 0
    changed = model(pixels, VISIBLE, MASKED, regressor)
    assert torch.equal(changed.visible, whole.visible)
    assert not torch.allclose(changed.masked, whole.masked)
    encoder = kept.clone()
    encoder[:, 2:4] = 0
    assert not torch.allclose(model(pixels, VISIBLE, MASKED, encoder).visible, whole.visible)


def test_without_a_regressor_nothing_masked_is_predicted(pixels):
    model = build(predictor_depth=0)
    prediction = model(pixels, VISIBLE, MASKED, torch.zeros(2, model.drop_columns))
    assert model.drop_columns == 4
    assert prediction.masked is None
    assert prediction.visible.shape == (2, 10, DIM)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(
    "over",
    [
        {},
        {"predictor_width": 12, "relative_positions": True},
        {"rotary_positions": True},
        {"predictor_depth": 0},
        {"head": "ln-fc"},
    ],
)
def test_every_parameter_is_trained(pixels, class_token, over):
    model = build(**over)
    prediction = model(pixels, VISIBLE, MASKED)
    target = torch.randn(2, 16 + class_token, DIM)
    terms = alignment_loss(
        prediction,
        target,
        VISIBLE,
        masked=MASKED,
        settings=LossSettings(),
        weights=torch.ones(2),
        has_class_token=class_token,
    )
    terms.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "over", [{}, {"predictor_width": 12}, {"relative_positions": True}, {"rotary_positions": True}, {"head": "ln-fc"}]
)
def test_bf16_autocast(pixels, over):
    model = build(**over)
    exact = model(pixels, VISIBLE, MASKED)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(pixels, VISIBLE, MASKED)
    for name in ("class_token", "visible", "masked"):
        torch.testing.assert_close(getattr(rough, name).float(), getattr(exact, name), rtol=0.05, atol=0.15)


@pytest.mark.parametrize("over", [{}, {"relative_positions": True}, {"rotary_positions": True}])
def test_it_compiles_without_graph_breaks(pixels, over):
    model = build(predictor_width=16, **over)
    drop = torch.rand(2, model.drop_columns)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got, wanted = compiled(pixels, VISIBLE, MASKED, drop), model(pixels, VISIBLE, MASKED, drop)
    torch.testing.assert_close(got.masked, wanted.masked)
    torch.testing.assert_close(got.visible, wanted.visible)
