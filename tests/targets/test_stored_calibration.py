"""The calibration on disk: every change of its bytes is an error with a fix, whatever the metadata."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from cae2pipe.artifacts.digest import file_entry
from cae2pipe.errors import DamageError
from cae2pipe.targets import TargetSet
from tests.conftest import edit_manifest


@pytest.fixture
def copy(target_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(target_root, tmp_path / "set")
    return tmp_path / "set"


def test_any_changed_byte_is_damage_with_its_remedy(copy: Path) -> None:
    pick = random.Random(0)
    for path in sorted(path for path in (copy / "codec.zarr").rglob("*") if path.is_file()):
        sound = path.read_bytes()
        for position in pick.choices(range(len(sound)), k=3):
            data = bytearray(sound)
            data[position] ^= 1 << pick.randrange(8)
            path.write_bytes(data)
            with pytest.raises(DamageError, match="has changed since it was written") as caught:
                TargetSet(copy)
            assert caught.value.where == str(path)
            assert f"cae2pipe verify {copy} --repair" in str(caught.value.fix)
        path.write_bytes(sound)
    assert len(TargetSet(copy)) == 300


def encoded(values: object) -> bytes:
    from cae2pipe.targets.chunks import encode_chunk

    return encode_chunk(np.asarray(values, dtype="<f4"), 0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("step/c/0", encoded([0.0]), "the step is not positive"),
        ("step/c/0", encoded([np.nan]), "step has values that are not finite"),
        ("mean/c/0", encoded(np.zeros(15)), r"mean does not have the shape \(16,\)"),
        ("basis/c/0/0", encoded(np.zeros((16, 15))), r"basis does not have the shape"),
        ("basis/c/0/0", None, "the basis, which the klt codec needs"),
        ("spread/c/0/0", None, "spread is missing"),
        ("mean/c/0", b"x" * 68, "checksum"),
    ],
)
def test_what_no_calibration_holds_is_refused_even_if_its_digests_fit(
    copy: Path, name: str, data: bytes | None, message: str
) -> None:
    units = json.loads((copy / "manifest.json").read_text())["units"]
    path = copy / "codec.zarr/patches" / name
    files = units["codec"]["files"]
    if data is None:
        path.unlink()
        del files[f"codec.zarr/patches/{name}"]
    else:
        path.write_bytes(data)
        files[f"codec.zarr/patches/{name}"] = file_entry(path)
    edit_manifest(copy, units=units)
    with pytest.raises(DamageError, match=message):
        TargetSet(copy)
