"""Bytes of a set's files: each file is counted once."""

from __future__ import annotations

import pytest

from cae2pipe.targets.set_bytes import array_shape, set_bytes
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents


@pytest.mark.parametrize("replayed", [True, False])
def test_all_files_are_counted_once(replayed, target_root, stored_root):
    root = target_root if replayed else stored_root
    targets = TargetSet(root)
    sizes = set_bytes(targets)
    files = {name: data for name, data in contents(root).items() if not name.startswith(("shards/", "manifest.json"))}
    assert sizes.total == sum(map(len, files.values()))
    assert sizes.pixels == sum(len(data) for name, data in files.items() if name.endswith(".tar"))
    assert sizes.arrays["norms"] == sum(len(data) for name, data in files.items() if "/norms/" in name)
    assert sizes.views == len(targets)
    assert sizes.latents / sizes.views == targets.bytes_per_view()["latents"]
    assert sizes.fp16 / sizes.views == targets.bytes_per_view()["fp16"]
    assert array_shape(targets, "symbols") == "16 × 17 uint16"
    assert array_shape(targets, "attention") == "16 uint8"
    assert array_shape(targets, "keys") == ""


def test_the_size_of_int8_follows_from_the_shapes(int8_root):
    targets = TargetSet(int8_root)
    sizes = set_bytes(targets)
    arrays = [f"/{name}/c/" for name in targets.layout.codec.arrays()]
    stored = sum(len(data) for name, data in contents(targets.root).items() if any(part in name for part in arrays))
    # Stores are whole blocks of 64: 70 and 10 samples take 128 and 64. Norms are compressed from 2 bytes per token.
    padded = 2 * (128 + 128 + 64)
    expected = sizes.int8 / sizes.views - 2 * targets.teacher.tokens
    assert stored / padded == pytest.approx(expected, rel=0.02)
