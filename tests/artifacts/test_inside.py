"""Second line of defence: names that point outside a folder are refused wherever a unit is staged."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.staging import StagedUnit, stage_path
from cae2pipe.artifacts.storage import to_path
from cae2pipe.errors import BadInputError

HOSTILE = ["/etc/x", "..", "a/../../x", "../x", "a//b", "", ".", "a/.", "a\\..\\b", "a\0b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "precious").write_bytes(b"")
    for root in (tmp_path / "root", to_path(f"memory://{uuid.uuid4().hex}")):
        for path in (inside, stage_path):
            with pytest.raises(BadInputError, match="is not a path inside the folder"):
                path(root, name)
    stage = StagedUnit(tmp_path / "root", "v00/000000")
    for refused in (stage.path, stage.commit):
        with pytest.raises(BadInputError, match="is not a path inside the folder"):
            refused(name)
    stage.discard()
    assert (tmp_path / "precious").exists()
    assert list((tmp_path / "root").iterdir()) == []


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b.zarr", "/", "\\"]), max_size=5).map("/".join))
def test_what_is_let_through_stays_inside(name: str) -> None:
    try:
        path = inside(Path("/none/root"), name)
    except BadInputError:
        return
    assert path.resolve().is_relative_to("/none/root")
    assert path.resolve() != Path("/none/root")


def test_a_linked_folder_on_the_way_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (outside / "000000.zarr").mkdir(parents=True)
    (root / "latents").mkdir(parents=True)
    (root / "latents" / "v00").symlink_to(outside)
    stage = StagedUnit(root, "v00/000000")
    with pytest.raises(BadInputError, match="symbolic link"):
        stage.path("latents/v00/000000.zarr")
    assert (outside / "000000.zarr").is_dir()
