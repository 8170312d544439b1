import pytest
import torch

from cae2pipe.config.pretrain import ModelSettings, OptimizerSettings
from cae2pipe.methods.caev2 import CAEv2
from cae2pipe.training.optimizer import build_optimizer, scaled


@pytest.fixture
def model() -> CAEv2:
    torch.manual_seed(0)
    return CAEv2(ModelSettings(width=16, depth=2, heads=2, image_size=32, predictor_depth=1, predictor_width=12), 8)


def names(model, optimizer) -> dict[float, set[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {known[id(p)] for p in group["params"]} for group in optimizer.param_groups}


def test_biases_and_one_dimensional_weights_do_not_decay(model):
    groups = names(model, build_optimizer(model, OptimizerSettings(weight_decay=0.3)))
    assert set(groups) == {0.3, 0.0}
    assert {"encoder.cls_token", "regressor.mask_token", "encoder.patch_embed.weight", "head.0.weight"} <= groups[0.3]
    for name in groups[0.0]:
        assert name.endswith(("bias", "gamma")) or "norm" in name or name in ("head.1.weight", "bridge.1.weight"), name
    assert not [name for name in groups[0.3] if name.endswith(("bias", "gamma")) or "norm" in name]


def test_every_parameter_is_in_one_group_and_positions_in_none(model):
    optimizer = build_optimizer(model, OptimizerSettings())
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())
    assert not [name for group in names(model, optimizer).values() for name in group if "pos_embed" in name]


def test_decay_shrinks_the_class_token_and_no_bias(model):
    optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.5))
    torch.nn.init.ones_(model.head[0].bias)
    token = model.encoder.cls_token.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.encoder.cls_token.detach(), 0.95 * token)
    assert torch.equal(model.head[0].bias, torch.ones(8))


def test_momenta_come_from_the_settings_and_the_rate_from_outside(model):
    optimizer = build_optimizer(model, OptimizerSettings(beta1=0.8, beta2=0.97))
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.97)
        assert group["lr"] == 0


def test_rates_scale_with_the_batch():
    settings = OptimizerSettings(lr=1.5e-3, min_lr=1e-5, warmup_epochs=7)
    assert scaled(settings, 2048) == pytest.approx((7, 1.5e-3, 1e-5))
    assert scaled(settings, 512) == pytest.approx((7, 1.5e-3 / 4, 1e-5 / 4))


def test_rates_stay_where_that_is_asked():
    assert scaled(OptimizerSettings(lr=1e-3, scale_lr=False), 512)[1:] == (1e-3, 1e-5)
