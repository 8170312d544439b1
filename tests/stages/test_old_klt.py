"""Sets of older versions, whose klt only rotates components, are read, grown and repaired in that form."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import numpy as np

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import extract_targets as stage
from cae2pipe.targets import TargetSet, stored_calibration
from cae2pipe.targets.codecs import KltCodec, TokenKltCodec
from cae2pipe.targets.paths import CODEC

SNIPPET = Path(__file__).parents[2] / "docs" / "read_with_zarr.py"


def test_a_set_keeps_its_form(photos, extract_settings, tmp_path, monkeypatch):
    out = tmp_path / "old"
    with monkeypatch.context() as patched:
        patched.setattr(stored_calibration, "rotates_tokens", lambda artifact: False)
        stage.extract_targets(photos, out, extract_settings(views=1), report=Silent())
    stage.extract_targets(photos, out, extract_settings(views=2), report=Silent())
    targets = TargetSet(out)
    assert type(targets.layout.codec) is KltCodec
    read = runpy.run_path(str(SNIPPET))["read_latents"]
    for view in (0, 1):
        first = next(item for item in targets if item.view == view)
        name = min(store for store, unit in targets.stores.items() if unit["view"] == view)
        np.testing.assert_allclose(read(str(out), name)[0], first.tokens, atol=1e-6)
    before = {path: path.read_bytes() for path in (out / "codec.zarr").rglob("*") if path.is_file()}
    shutil.rmtree(out / "codec.zarr")
    stage.extract_targets(photos, out, extract_settings(views=2), report=Silent(), remake=[CODEC])
    assert {path: path.read_bytes() for path in (out / "codec.zarr").rglob("*") if path.is_file()} == before
    assert TargetsArtifact.open(out).whole()
    fresh = stage.extract_targets(photos, tmp_path / "new", extract_settings(views=1), report=Silent())
    assert type(TargetSet(fresh.root).layout.codec) is TokenKltCodec
