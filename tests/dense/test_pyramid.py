"""Four maps of a plain vision transformer: strides, rates, gradients."""

import pytest
import timm
import torch

from cae2pipe.dense.pyramid import Pyramid, decay_groups, taps
from cae2pipe.dense.upernet import UperNet, segmentation_loss
from cae2pipe.models.trainable import add_relative_positions

SIZES = {"tiny": (192, 12, 12), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def vit(width: int, depth: int, heads: int, size: int = 64):
    return timm.create_model(
        "vit_base_patch16_224", num_classes=0, img_size=size, embed_dim=width, depth=depth, num_heads=heads
    )


@pytest.mark.parametrize(
    ("depth", "wanted"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (6, [1, 2, 3, 5]), (2, [0, 0, 0, 1])]
)
def test_taps_are_the_published_ones(depth, wanted):
    assert taps(depth) == wanted


@pytest.mark.parametrize("size", SIZES)
def test_shapes_and_strides(size):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        pyramid = Pyramid(vit(width, depth, heads))
        maps = pyramid(torch.zeros(2, 3, 64, 64))
    assert [tuple(found.shape) for found in maps] == [
        (2, width, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)
    ]


@pytest.fixture
def segmenter():
    torch.manual_seed(0)
    encoder = vit(24, 4, 2)
    add_relative_positions(encoder, "here")
    return UperNet(Pyramid(encoder), classes=3, width=16, dropout=0.0, auxiliary=True)


def test_every_parameter_gets_a_gradient_and_a_rate(segmenter):
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    found = segmenter.train()(images)
    assert [tuple(logits.shape) for logits in found] == [(2, 3, 64, 64)] * 2
    segmentation_loss(found, labels, 0.4).backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []
    scale, decay = {}, {}
    for group in decay_groups(segmenter.pyramid, segmenter, 0.05, layer_decay=0.5):
        for parameter in group["params"]:
            assert id(parameter) not in scale
            scale[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    for name, parameter in segmenter.named_parameters():
        path = name.removeprefix("pyramid.encoder.")
        layer = 5 if path == name else int(path.split(".")[1]) + 1 if path.startswith("blocks.") else 0
        assert scale[id(parameter)] == 0.5 ** (5 - layer), name
        # Also the class token's, as in CAE's code.
        assert (decay[id(parameter)] == 0) == (parameter.ndim <= 1), name


def test_scores_come_without_the_auxiliary_head(segmenter):
    logits, auxiliary = segmenter.eval()(torch.randn(1, 3, 64, 64))
    assert auxiliary is None
    assert logits.shape == (1, 3, 64, 64)


def test_the_loss_by_hand():
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2)
    labels = torch.tensor([[[0, 255]]])
    own = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0] / 2  # mean of two pixels, one of which counts as zero
    assert float(segmentation_loss((logits, None), labels, 0.4)) == pytest.approx(float(own))
    assert float(segmentation_loss((logits, logits), labels, 0.4)) == pytest.approx(1.4 * float(own))
    assert float(segmentation_loss((logits, None), torch.full_like(labels, 255), 0.4)) == 0
