"""Every method trains, goes on, exports and is scored by the same commands; one from outside too."""

from __future__ import annotations

import pytest
import timm
import torch

from cae2pipe.config.base import load
from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.methods import registry
from cae2pipe.methods.losses import Prediction, gather_tokens
from cae2pipe.methods.method import Method, latent_head
from cae2pipe.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines


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


@pytest.mark.parametrize("name", [*registry.METHODS, "toy"])
def test_trains_goes_on_exports_and_is_scored(name, target_root, pretrain_settings, photos, tmp_path):
    fast = {"scale_lr": False, "lr": 3e-3, "warmup_epochs": 0}
    over = {"method": name, "model": {"regressor_width": 16}, "optimizer": fast}
    whole, out = tmp_path / "whole", tmp_path / "out"
    pretrain(target_root, whole, pretrain_settings(**over), Silent())
    pretrain(target_root, out, pretrain_settings(**over, stop_after=4), Silent())
    assert not (out / "encoder.safetensors").exists()
    pretrain(target_root, out, pretrain_settings(**over), Silent())
    assert (out / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()
    losses = [line["loss"] for line in read_lines(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "val"):
        (data / part).symlink_to(photos)
    knn = load(KnnSettings, "evaluate", "knn", ["speed.workers=0", "speed.device=cpu"])
    assert 0 <= evaluate("knn", str(out), data, tmp_path / "scores", knn, Silent())["top1"] <= 1


def test_presets_of_rivals():
    for name, method, kind in (
        ("cae", "cae", "cosine"),
        ("mvp", "mvp", "cosine"),
        ("maskdistill", "mvp", "smooth_l1"),
        ("mae", "mae", "cosine"),
        ("fd", "fd", "smooth_l1"),
    ):
        settings = load(PretrainSettings, "pretrain", name)
        assert (settings.method, settings.loss.kind) == (method, kind)
        assert (settings.loss.target == "layer_norm") is (kind == "smooth_l1")
        assert (settings.loss.visible == 0) is (name != "fd")
