from __future__ import annotations

import pytest
import torch

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.check import check_features, check_output
from cae2pipe.teachers.protocol import TeacherInfo, TeacherOutput


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0)) + 3


def test_latents_that_differ_pass(tokens):
    check_features(tokens, where="here", constant=True)
    check_features(tokens[:1], where="here", constant=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_refused(tokens, value):
    tokens[2, 3, 4] = value
    with pytest.raises(TeacherError, match=r"not finite \(1 of 576") as refused:
        check_features(tokens, where="shard 000003")
    assert refused.value.where == "shard 000003"


INFO = TeacherInfo(
    library="timm", name="x", architecture={}, weights="", dim=16, rows=2, cols=4, class_token=True, image_size=32,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), precision="fp16", summary=8, layers=(3, 12),
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (lambda output: output.layers[3], "tokens of layer 3 are"),
        (lambda output: output.layers[12], "tokens of layer 12 are"),
        (lambda output: output.attention, "attention is"),
        (lambda output: output.tokens[:, :1], "class token is"),
        (lambda output: output.tokens[:, 1:], "patch tokens are"),
        (lambda output: output.summary, "summary is"),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named_and_its_image(tokens, part, told):
    output = TeacherOutput(tokens, torch.rand(4, 8), torch.rand(4, 8), {12: tokens.clone(), 3: tokens.clone()})
    keys = ["a", "b", "c", "d"]
    check_output(output, INFO, keys, "here", constant=True)
    part(output)[2:] = float("inf")
    output.summary[3] = float("nan")
    with pytest.raises(TeacherError, match=f"teacher's {told} not finite .*; first in image c") as refused:
        check_output(output, INFO, keys, "here")
    assert refused.value.fix.startswith("--set teacher.precision=bf16")


@pytest.mark.parametrize(
    ("degenerate", "between"),
    [
        (lambda tokens: tokens[:1, :1].expand(4, 9, 16), "patches"),
        (lambda tokens: tokens[:, :1].expand(4, 9, 16) + 1e-6 * tokens, "patches"),
        (lambda tokens: tokens[:1].expand(4, 9, 16), "images"),
        (torch.zeros_like, "patches"),
    ],
)
def test_latents_that_tell_nothing_apart_are_refused(tokens, degenerate, between):
    features = degenerate(tokens)
    check_features(features, where="here")
    with pytest.raises(TeacherError, match=f"hardly differ between {between}"):
        check_features(features, where="here", constant=True)
