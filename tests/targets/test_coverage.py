"""Which views of which shards exist, and the number of images per class."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.targets.coverage import ABSENT, DAMAGED, PRESENT, class_counts, coverage, one_store_a_shard
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import edit_manifest


def test_a_whole_set(target_root):
    targets = TargetSet(target_root)
    result = coverage(targets)
    assert result.shards == ["000000", "000001", "000002"]
    assert result.complete
    assert result.cells.shape == (2, 3)
    assert result.names(ABSENT) == result.names(DAMAGED) == []
    assert result.names(PRESENT) == sorted(targets.stores)
    assert one_store_a_shard(targets) == ["v00/000000", "v00/000001", "v00/000002"]


def test_shards_without_a_name_yet(target_root, tmp_path):
    for path in target_root.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(target_root)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(target_root)).symlink_to(path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_bytes((target_root / "manifest.json").read_bytes())
    edit_manifest(tmp_path, wanted={"views": 2, "shards": 5, "images": 300})
    (tmp_path / "latents/v00/000001.zarr/patches/norms/c/0/0").unlink()
    targets = TargetSet(tmp_path, damaged="omit")
    result = coverage(targets, ["000003"])
    assert result.shards == ["000000", "000001", "000002", "000003", ""]
    assert result.names(ABSENT) == ["v00/000003", "v00/?", "v01/000003", "v01/?"]
    assert result.names(DAMAGED) == ["v00/000001"]
    assert not result.complete
    assert one_store_a_shard(targets) == ["v00/000000", "v01/000001", "v00/000002"]


@given(st.lists(st.integers(-1, 3)))
def test_every_labelled_image_is_counted_once(labels):
    counts = class_counts(np.array(labels, dtype=np.int32), ["a", "b", "c", "d"])
    assert sorted(name for name, _ in counts) == ["a", "b", "c", "d"]
    assert sum(count for _, count in counts) == sum(label >= 0 for label in labels)
    assert [count for _, count in counts] == sorted((count for _, count in counts), reverse=True)
