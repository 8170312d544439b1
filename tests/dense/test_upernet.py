"""The segmenter: precision of its logits."""

from __future__ import annotations

import pytest
import timm
import torch

from cae2pipe.dense.pyramid import Pyramid
from cae2pipe.dense.sliding import sliding_logits
from cae2pipe.dense.upernet import UperNet, spread_norms
from cae2pipe.training.compilation import compile_in_place


def segmenter() -> UperNet:
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=64, embed_dim=24, depth=4, num_heads=2)
    return UperNet(Pyramid(encoder), classes=3, width=16, dropout=0.0, auxiliary=True)


@torch.no_grad()
def test_logits_are_float32_under_autocast(backends):
    """Also before resizing to the image and summing over windows: rounded to bfloat16, many classes would be equal."""
    model = segmenter().eval()
    precisions, given = [], []
    model.head[-1].register_forward_pre_hook(lambda _, args: precisions.append(torch.get_float32_matmul_precision()))
    model.head[-1].register_forward_hook(lambda _, args, found: given.append(found))
    image = torch.randn(3, 80, 64, generator=torch.Generator().manual_seed(1))
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16):
        found = sliding_logits(lambda windows: model(windows)[0], image, 64, stride=16, batch=2, fill=torch.zeros(3))
    for logits in (found, *given):
        assert logits.dtype == torch.float32
        assert (logits != logits.bfloat16()).float().mean() > 0.9
    assert precisions == ["highest"]


def test_norms_over_processes_are_not_compiled(graphs, monkeypatch):
    seen, forward = [], torch.nn.SyncBatchNorm.forward

    def watched(self, images):
        seen.append(torch.compiler.is_compiling())
        return forward(self, images)

    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", watched)
    model = segmenter().train()
    names = list(model.state_dict())
    model = spread_norms(model, 2, torch.device("cuda", 0))
    assert list(model.state_dict()) == names
    compile_in_place([model.pyramid])
    model(torch.randn(2, 3, 64, 64))[0].sum().backward()
    assert graphs.frame_count > 0
    assert seen
    assert not any(seen)


def test_heads_begin_as_in_mmsegmentation():
    """Classifiers of std 0.01 without bias; He's normal by outputs elsewhere; no norm of the maps that are read."""
    model = segmenter()
    heads = [*model.decoder.named_modules(), *model.head.named_modules(), *model.auxiliary.named_modules()]
    classifiers = [layer for _, layer in heads if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None]
    assert [layer.out_channels for layer in classifiers] == [3, 3]
    for layer in classifiers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert not layer.bias.any()
    others = [layer for _, layer in heads if isinstance(layer, torch.nn.Conv2d) and layer.bias is None]
    for layer in others:
        wanted = (2 / (layer.out_channels * layer.weight[0, 0].numel())) ** 0.5
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.15)
    assert len(others) == 13
    assert not any(isinstance(layer, torch.nn.LayerNorm) for _, layer in heads)


def test_both_heads_are_trained_on_float32(backends):
    with torch.autocast("cpu", torch.bfloat16):
        found = segmenter().train()(torch.randn(2, 3, 64, 64))
    assert [logits.dtype for logits in found] == [torch.float32] * 2
