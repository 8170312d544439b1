"""Every method trains, resumes, exports and is scored by the same commands; so does an external one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch

from cae2pipe.config.base import load, merge
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import FinetuneSettings, KnnSettings
from cae2pipe.config.pretrain import LossSettings, PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.evaluation.finetune import build_classifier
from cae2pipe.methods import registry
from cae2pipe.methods.losses import Prediction, alignment_loss
from cae2pipe.methods.method import Method, latent_head
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.models.layers import gather_tokens
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.export import export
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.fit import check_fit
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.student import load_method
from cae2pipe.training.target_spec import PixelTargets, unfolded


class Toy(Method):
    """An encoder and a head."""

    def __init__(self, settings, target_dim):
        super().__init__(settings)
        self.head = latent_head(settings, settings.width, target_dim)

    def forward(self, pixels, visible, masked, drop=None):
        latents = self.head(self.encoder(pixels))
        return Prediction(latents[:, :1], gather_tokens(latents[:, 1:], visible), None)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.register("toy", Toy)


DBOT = {"kind": "smooth_l1", "beta": 2.0, "target": "layer_norm", "class_token": "masked", "visible": 0.0}
FAST = {"scale_lr": False, "lr": 3e-3, "warmup_epochs": 0}
PIXELS = {"loss": {"target": "pixels", "kind": "mse", "visible": 0.0}, "mask": {"strategy": "random"}}
VARIANTS = {
    **{name: {"method": name} for name in [*registry.METHODS, "toy"]},
    "maskdistill": {"method": "mvp", "loss": {"kind": "smooth_l1", "target": "layer_norm", "visible": 0.0}},
    "dbot": {"method": "mae", "loss": DBOT},
    "milan": {"method": "milan", "loss": {"reduction": "one_mean"}, "mask": {"strategy": "attention"}},
    "mae-pixels": {"method": "mae", **PIXELS},
}
"""Every method, with loss and masks of its preset if they are specific to it."""


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_goes_on_exports_and_is_scored(name, target_root, pretrain_settings, photos, tmp_path):
    over = {**VARIANTS[name], "model": {"predictor_width": 16}, "optimizer": FAST}
    whole, out = tmp_path / "whole", tmp_path / "out"
    pretrain(target_root, whole, pretrain_settings(**over), report=Silent())
    pretrain(target_root, out, pretrain_settings(**over, stop_after=4), report=Silent())
    assert not (out / "encoder.safetensors").exists()
    pretrain(target_root, out, pretrain_settings(**over), report=Silent())
    assert (out / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    losses = [line["loss"] for line in read_lines(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "val"):
        (data / part).symlink_to(photos)
    knn = load(KnnSettings, "evaluate", "knn", overrides=["speed.workers=0", "speed.device=cpu"])
    result = evaluate("knn", str(out), data, out=tmp_path / "scores", settings=knn, report=Silent())
    assert 0 <= result["top1"] <= 1
    # The class token has no loss with pixel targets, nor if visible tokens have none.
    assert result["feature"] == ("mean" if name in ("maskdistill", "mae-pixels") else "class")


def test_milans_preset():
    settings = load(PretrainSettings, "pretrain", "milan")
    assert (settings.method, settings.mask.strategy, settings.masked_patches) == ("milan", "attention", 147)
    assert settings.loss.reduction == "one_mean"


def test_pixels_are_learnt_from_views_alone(target_root, pretrain_settings, tmp_path):
    """Without reading latents, and on a grid that differs from the teacher's."""
    pixels = pretrain_settings(method="mae", **PIXELS, model={"patch_size": 4})
    shutil.copytree(target_root, tmp_path / "set")
    for path in (tmp_path / "set" / "latents").glob("*/*.zarr/patches/symbols/c/*/*/*/*"):
        path.write_bytes(bytes(path.stat().st_size))
    pretrain(tmp_path / "set", tmp_path / "one", pixels, report=Silent())
    pretrain(target_root, tmp_path / "two", pixels, report=Silent())
    one, two = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_pixel_targets_are_patches_of_mean_0_and_variance_1_in_the_order_of_patches():
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = PixelTargets(3, torch.device("cpu"))(SimpleNamespace(pixels=pixels))["decoded"]
    assert found.shape == (2, 9, 48)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    patch = ((pixels[1, :, 4:8, 8:12] / 255 - mean) / std).reshape(-1)
    wanted = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(found[1, 1 * 3 + 2], wanted)


def test_patches_are_those_of_unfold():
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(unfolded(images, 3), torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"targets": "online", "loss": {"target": "pixels"}}, "have no teacher"),
        ({"targets": "online", "views": "fresh", "mask": {"strategy": "attention"}}, "have no attention"),
    ],
)
def test_settings_that_contradict_each_other(over, message, pretrain_settings):
    with pytest.raises(SettingsError, match=message):
        pretrain_settings(**over)


def test_masks_need_a_teacher_with_attention(target_root, pretrain_settings, tmp_path):
    settings = pretrain_settings(mask={"strategy": "attention"})
    targets = TargetSet(target_root)
    targets.layout = replace(targets.layout, attention=False)
    with pytest.raises(SettingsError, match="has no attention"):
        check_fit(targets, settings, 1)


def test_dbots_presets_are_its_released_codes():
    """Its main branch, and its branch beit for teachers such as CLIP."""
    own, taught = (load(PretrainSettings, "pretrain", name) for name in ("dbot", "dbot-clip"))
    decoder = own.model.predictor_depth, own.model.predictor_width, own.model.predictor_heads
    assert (own.mask.strategy, own.masked_patches, decoder, own.model.drop_path) == ("random", 147, (8, 512, 16), 0.2)
    assert own.loss == LossSettings.model_validate(DBOT)
    assert (taught.mask.strategy, taught.masked_patches, taught.model.drop_path) == ("block", 78, 0.1)


def test_the_rivals_of_the_grid_are_the_presets():
    """Apart from MVP on all tokens, which is no preset."""
    grid = load(GridSettings, "compare", "rivals")
    names = {
        "MAE on latents": "mae",
        "MAE on pixels": "mae-pixels",
        "CAE v2": "base",
        "dBOT taught by CLIP": "dbot-clip",
    }
    for variant in grid.variants:
        if variant.name != "MVP, all tokens":
            preset = load(PretrainSettings, "pretrain", names.get(variant.name, variant.name.lower()))
            assert load(PretrainSettings, "pretrain", grid.config, values=merge(grid.set, variant.set)) == preset


def test_dbots_loss_is_that_of_its_code():
    """Smooth-L1 with beta 2 between predictions and normalised targets of class token and masked patches."""
    draw = torch.Generator().manual_seed(0)
    prediction = Prediction(*(4 * torch.randn(2, count, 6, generator=draw) for count in (1, 3, 2)))
    target = torch.randn(2, 6, 6, generator=draw)
    visible, masked = torch.tensor([[0, 2, 4], [1, 2, 3]]), torch.tensor([[1, 3], [0, 4]])
    found = alignment_loss(
        prediction,
        target,
        visible,
        masked=masked,
        settings=LossSettings.model_validate(DBOT),
        weights=torch.ones(2),
        has_class_token=True,
    )
    wanted = torch.stack([target[row, [0, *(1 + index for index in masked[row].tolist())]] for row in range(2)])
    wanted = (wanted - wanted.mean(dim=-1, keepdim=True)) / wanted.std(dim=-1, correction=0, keepdim=True)
    gap = (torch.cat([prediction.class_token, prediction.masked], dim=1) - wanted).abs()
    by_hand = torch.where(gap < 2, gap**2 / 4, gap - 1).mean()
    torch.testing.assert_close(found.total, by_hand, rtol=1e-4, atol=1e-4)


def test_presets_of_rivals():
    for name, method, kind in (
        ("cae", "cae", "cosine"),
        ("mvp", "mvp", "cosine"),
        ("maskdistill", "mvp", "smooth_l1"),
        ("mae", "mae", "cosine"),
        ("mae-pixels", "mae", "mse"),
        ("dbot", "mae", "smooth_l1"),
        ("dbot-clip", "mvp", "cosine"),
        ("fd", "fd", "smooth_l1"),
    ):
        settings = load(PretrainSettings, "pretrain", name)
        assert (settings.method, settings.loss.kind) == (method, kind)
        assert (settings.loss.target == "layer_norm") is (kind == "smooth_l1")
        assert (settings.loss.visible == 0) is (name != "fd")
        assert (settings.loss.target == "pixels") is (name == "mae-pixels")
        assert settings.model.predictor_norm is (name == "cae")


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_more_positions_are_trained_and_go_along(trained_run, tmp_path, positions):
    """CAE, whose alignment target and regressor have them too."""
    run = trained_run(method="cae", model={f"{positions}_positions": True, "predictor_norm": True}, optimizer=FAST)
    method, _ = load_method(run, 16, Silent())
    tables = {name: tensor for name, tensor in method.named_parameters() if name.endswith("bias_table")}
    if positions == "relative":
        assert [name.split(".")[0] for name in tables] == ["encoder", "encoder", "regressor"]
        assert all(table.abs().max() > 0 for table in tables.values())
    else:
        assert not tables
        assert all(part.places.turns is not None for part in (method.encoder, method.regressor))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(str(run), 0, torch.device("cpu"))
    with torch.no_grad():
        wanted = method.encoder(encoder.normalise(pixels))
    torch.testing.assert_close(encoder.tokens(pixels).together(), wanted, rtol=1e-4, atol=1e-5)
    for kind in ("hf", "open_clip"):
        with pytest.raises(SettingsError, match=f"the format {kind} has no {positions} positions"):
            export(str(run), tmp_path / kind, kind, scores=[])
    export(str(run), tmp_path / "timm", "timm", scores=[])
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(encoder.normalise(pixels)), wanted, rtol=1e-4, atol=1e-5)
    # Fine-tuning starts with them, with learnt biases also where it would add none. To rotary ones it adds zeros.
    added = f"relative_positions={str(positions == 'rotary').lower()}"
    own = load(FinetuneSettings, "evaluate", "finetune", overrides=[added, "drop_path=0"])
    classifier = build_classifier(encoder, 3, own, spec=str(run)).eval()
    attn = classifier.model.blocks[1].attn
    table = attn.relative_positions.relative_position_bias_table
    assert torch.equal(table, tables.get("encoder.blocks.1.attn.relative_position_bias_table", torch.zeros_like(table)))
    with torch.no_grad():
        blocks = classifier.model.forward_features(encoder.normalise(pixels))  # its norm comes after pooling
        torch.testing.assert_close(method.encoder.norm(blocks), wanted, rtol=1e-4, atol=1e-5)
    classifier.model(encoder.normalise(pixels)).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in (attn.qkv.weight, table))
