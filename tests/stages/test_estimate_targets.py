"""The estimate against the set that is then made."""

from __future__ import annotations

import shutil

import pytest

from cae2pipe.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.targets.target_set import TargetSet


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_near_the_set_and_writes_nothing(target_root, photos, tmp_path, extract_settings, packed) -> None:
    source = tmp_path / "source"
    settings = extract_settings()
    if packed:
        build_shard_set(photos, source, settings.shard, Silent())
    else:
        shutil.copytree(photos, source)
    before = sorted(path for path in tmp_path.rglob("*"))
    found = estimate_targets(source, settings, Silent())
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (found["images"], found["views"]) == (150 if packed else found["images"], 2)
    rows = {row["codec"]: row for row in found["codecs"]}
    assert rows["klt"]["latents"] < rows["int8"]["latents"] < rows["fp16"]["latents"]
    assert rows["fp16"]["mean"] > rows["int8"]["mean"] > rows["klt"]["mean"] > 0.998
    stored = TargetSet(target_root).bytes_per_view()
    assert rows["klt"]["latents"] == pytest.approx(stored["latents"], rel=0.25)
    assert found["pixels"] == pytest.approx(stored["pixels"] + 2048, rel=0.25)
    assert rows["klt"]["bytes"] == pytest.approx(
        found["images"] * 2 * (found["pixels"] + rows["klt"]["latents"]), rel=0.01
    )
    assert rows["klt"]["seconds"] > 0
    assert rows["klt"]["paid_from_epoch"] >= 2
