from __future__ import annotations

import pytest
import torch

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.check import check_features


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
