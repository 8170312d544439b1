"""A target set as data: a sequence of views, and the same latents with zarr and numpy alone."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets import TargetSet

SNIPPET = Path(__file__).parents[2] / "docs" / "read_with_zarr.py"


@pytest.fixture(scope="module", params=["klt", "int8", "fp16"])
def root(request, tmp_path_factory, photos, extract_settings) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "set"
    extract_targets(photos, out, extract_settings(codec={"name": request.param}, views=2), report=Silent())
    return out


def test_every_view_once_in_order(root):
    targets = TargetSet(root)
    items = list(targets)
    assert len(items) == len(targets) == 300
    assert len({(item.key, item.view) for item in items}) == 300
    assert [item.view for item in items] == [0] * 150 + [1] * 150
    assert {targets.classes[item.label] for item in items} == set(targets.classes)
    assert all(item.key.startswith(targets.classes[item.label]) for item in items)
    first = targets[0]
    assert first.tokens.shape == (17, 16)
    assert first.norms.shape == (17,)
    assert first.pixels.shape == (32, 32, 3)
    assert first.attention.shape == (16,)
    assert first.tokens.dtype == first.norms.dtype == np.float32
    assert np.linalg.norm(first.tokens, axis=1) == pytest.approx(np.ones(17), abs=0.05)


def test_indices(root):
    targets = TargetSet(str(root))
    for index in (0, 63, 64, 69, 70, 149, 150, 299):
        item = targets[index]
        assert item.key == targets[index - 300].key
        assert np.array_equal(item.tokens, targets[index - 300].tokens)
    assert [item.key for item in targets[68:72]] == [targets[index].key for index in range(68, 72)]
    for index in (300, -301):
        with pytest.raises(IndexError):
            targets[index]


def test_torch(root):
    one, other = TargetSet(root, "torch")[100], TargetSet(root)[100]
    assert isinstance(one.tokens, torch.Tensor)
    for name in ("tokens", "norms", "pixels", "attention"):
        assert np.array_equal(getattr(one, name).numpy(), getattr(other, name))


def test_zarr_and_numpy_alone_read_the_same(root):
    read = runpy.run_path(str(SNIPPET))["read_latents"]
    targets, position = TargetSet(root), 0
    for name in sorted(targets.stores):
        latents = read(str(root), name)
        assert latents.dtype == np.float32
        for row in latents:
            np.testing.assert_allclose(row, targets[position].tokens, atol=1e-6)
            position += 1
    assert position == len(targets)


def test_the_snippet_is_short_and_needs_nothing_of_ours(root):
    text = SNIPPET.read_text()
    code = [line for line in text.split("def read_latents")[1].splitlines() if line.strip()]
    assert len(code) <= 20
    assert "cae2pipe" not in text
    done = subprocess.run([sys.executable, SNIPPET, root, "v01/000000"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(70,", "17,", "16)"]
