"""The codec's error by component and token, compared with values computed from all views at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cae2pipe.targets.auditing import LiveViews
from cae2pipe.targets.fidelity_profile import ProfileBuilder
from cae2pipe.targets.target_set import TargetSet


@pytest.fixture
def targets(target_root) -> TargetSet:
    return TargetSet(target_root)


def views(targets: TargetSet, count: int, seed: int) -> LiveViews:
    teacher = targets.teacher
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(count, teacher.tokens, teacher.dim, generator=generator) * torch.arange(1, teacher.dim + 1)
    true = torch.nn.functional.normalize(true, dim=-1)
    noise = torch.randn(true.shape, generator=generator) * torch.rand(count, 1, 1, generator=generator) * 0.1
    names = [f"v00/{seed:06d}, key {number}" for number in range(count)]
    pixels = np.zeros((count, 8, 8, 3), dtype=np.uint8)
    return LiveViews(names, pixels, {"patches": (true, true + noise)})


def test_figures_are_those_of_all_views_at_once(targets):
    pieces = [views(targets, count, seed) for seed, count in enumerate((7, 1, 12))]
    builder = ProfileBuilder(targets, 3)
    for piece in pieces:
        builder.add(piece)
    profile = builder.profile()
    assert profile is not None
    true, stored = (torch.cat([getattr(piece, name) for piece in pieces]).double() for name in ("true", "stored"))
    mean = targets.mean.double()
    centred = torch.cosine_similarity(true - mean, stored - mean, dim=-1)
    assert profile.views == 20
    assert profile.raw == pytest.approx(float(torch.cosine_similarity(true, stored, dim=-1).mean()), abs=1e-6)
    assert profile.centred == pytest.approx(float(centred.mean()), abs=1e-6)
    np.testing.assert_allclose(profile.by_token, centred.mean(dim=0), atol=1e-6)
    # Sums do not depend on the axes; the axes are those of largest variance, in order.
    tokens = 20 * targets.teacher.tokens
    assert profile.variance.sum() == pytest.approx(float((true - mean).square().sum()) / tokens)
    assert profile.error.sum() == pytest.approx(float((true - stored).square().sum()) / tokens)
    assert (np.diff(profile.variance) <= 0).all()
    largest = torch.linalg.matrix_norm((true - mean).flatten(0, 1), ord=2) ** 2 / tokens
    assert profile.variance[0] == pytest.approx(float(largest))
    by_view = centred.mean(dim=1)
    names = [name for piece in pieces for name in piece.names]
    assert [view.name for view in profile.worst] == [names[i] for i in by_view.argsort()[:3]]
    assert profile.worst[0].cosines.shape == (targets.teacher.patches,)


def test_error_in_one_component_is_found_there(targets):
    live = views(targets, 4, 0)
    values, axes = torch.linalg.eigh(
        (live.true - targets.mean).flatten(0, 1).T @ (live.true - targets.mean).flatten(0, 1)
    )
    builder = ProfileBuilder(targets, 1)
    builder.add(LiveViews(live.names, live.pixels, {"patches": (live.true, live.true + 0.1 * axes[:, -3])}))
    profile = builder.profile()
    assert profile is not None
    assert len(values) == len(profile.error)
    assert profile.error.argmax() == 2
    assert profile.error[2] == pytest.approx(0.01, rel=1e-3)


def test_without_views_there_is_no_profile(targets):
    assert ProfileBuilder(targets, 3).profile() is None
