"""Sets of an earlier format: everything names the command that converts them, which changes no symbol.

``data/targets-format-3.tar.xz`` holds sets that the last version with that format wrote.
"""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from cae2pipe import recode
from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.commands.app import app
from cae2pipe.errors import Cae2pipeError, DamageError, ManifestError, MismatchError, SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.repack import repack
from cae2pipe.stages.verify import verify
from cae2pipe.targets import TargetSet
from cae2pipe.targets.codecs import KltCodec, TokenKltCodec
from tests.conftest import contents, write_photos

ARCHIVE = Path(__file__).parent / "data" / "targets-format-3.tar.xz"
SNIPPET = Path(__file__).parents[2] / "docs" / "read_with_zarr.py"
NAMES = ["klt", "klt-stored", "klt-components", "int8", "fp16"]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A folder of sets."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def stores(root: Path) -> list[str]:
    return sorted(name for name in json.loads((root / "manifest.json").read_text())["units"] if name.startswith("v"))


@pytest.mark.parametrize("name", NAMES)
def test_no_symbol_changes(earlier, tmp_path, name):
    old = earlier / name
    made = repack(old, tmp_path / "set", report=Silent())
    assert made.complete
    assert made.identity == json.loads((old / "manifest.json").read_text())["identity"]
    assert verify(made.root, Silent()).problems == []
    targets = TargetSet(made.root)
    assert sorted(targets.stores) == stores(old)
    if name.startswith("klt"):
        assert type(targets.layout.codec) is (KltCodec if name == "klt-components" else TokenKltCodec)
    for store in targets.stores:
        theirs = zarr.open_group(old / "latents" / f"{store}.zarr", mode="r")
        reader = targets.reader(store)
        for block, array in itertools.product(range(reader.blocks), targets.layout.blocked()):
            axis = targets.layout.blocked()[array].sample_axis
            where = (slice(None),) * axis + (slice(64 * block, 64 * block + 64),)
            assert np.array_equal(reader.arrays(block)[array], theirs[array][where]), (store, array)
        records = reader.records()
        assert [key.encode() for key in records.keys] == [bytes(row).rstrip(b"\0") for row in theirs["keys"][...]]
        for field in ("labels", "draws", "members"):
            assert np.array_equal(getattr(records, field), theirs[field][...])
        read = runpy.run_path(str(SNIPPET))["read_latents"]
        mine = np.stack([view.tokens for view in targets if view.view == targets.stores[store]["view"]])
        np.testing.assert_allclose(read(str(made.root), store), mine, atol=1e-5)
    assert len({view.key for view in targets}) == targets.images


@pytest.mark.parametrize(
    "call",
    [
        TargetSet,
        inspect_folder,
        lambda root: verify(root, Silent()),
        lambda root: recode(root, root.parent / "other", lossy_source=True, progress=False),
    ],
)
def test_everything_else_names_the_command(earlier, call):
    with pytest.raises(ManifestError, match="format 3") as caught:
        call(earlier / "int8")
    assert f"cae2pipe recode {earlier / 'int8'} NEW --repack" in str(caught.value.fix)


def test_commands_name_it_too(earlier, tmp_path):
    for command in (["pretrain"], ["report"], ["inspect"], ["verify"]):
        out = [str(tmp_path / "run")] if command == ["pretrain"] else []
        result = CliRunner().invoke(app, [*command, str(earlier / "klt"), *out])
        assert result.exit_code == 2, command
        assert "--repack" in result.output.replace("\n", " "), command


def test_a_repacked_set_grows_as_the_old_one_would(earlier, extract_settings, tmp_path):
    photos = write_photos(tmp_path / "photos", classes=2, each=33)
    made = recode(earlier / "klt", tmp_path / "set", repack=True, progress=False)
    first = contents(Path(made.root) / "latents")
    extract_targets(photos, Path(made.root), extract_settings(views=2), report=Silent())
    assert TargetSet(made).views == 2
    assert first.items() <= contents(Path(made.root) / "latents").items()


@pytest.mark.parametrize("crash_at", range(1, 6))
def test_an_interrupted_repack_is_resumed_to_the_same_bytes(earlier, tmp_path, monkeypatch, crash_at):
    whole = contents(repack(earlier / "klt-stored", tmp_path / "whole", report=Silent()).root)
    real, calls = TargetsArtifact.add, itertools.count(1)

    def add(self, name, unit):
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        real(self, name, unit)

    with monkeypatch.context() as patched:
        patched.setattr(TargetsArtifact, "add", add)
        try:
            repack(earlier / "klt-stored", tmp_path / "set", report=Silent())
        except KeyboardInterrupt:
            assert not TargetsArtifact.open(tmp_path / "set").complete
    repack(earlier / "klt-stored", tmp_path / "set", report=Silent())
    assert contents(tmp_path / "set") == whole


def test_a_changed_byte_is_named_and_a_lost_file_costs_its_store(earlier, tmp_path):
    old = shutil.copytree(earlier / "klt-stored", tmp_path / "old")
    path = old / "latents/v01/000000.zarr/symbols/c/0/0/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        repack(old, tmp_path / "set", report=Silent())
    assert caught.value.where == str(path)
    assert "remove the file" in str(caught.value.fix)
    path.unlink()
    made = repack(old, tmp_path / "set", report=Silent())
    assert sorted(TargetSet(made.root).stores) == ["v00/000000"]
    assert not made.complete


def test_a_changed_tar_is_named(earlier, tmp_path):
    old = shutil.copytree(earlier / "klt-stored", tmp_path / "old")
    tar = old / "views/v00/000000.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamageError, match="tar has changed"):
        repack(old, tmp_path / "set", report=Silent())


def test_what_cannot_be_repacked(earlier, target_root, tmp_path):
    with pytest.raises(ManifestError, match="already has the newest format"):
        repack(target_root, tmp_path / "set", report=Silent())
    with pytest.raises(Cae2pipeError, match="inside the source"):
        repack(earlier / "klt", earlier / "klt" / "new", report=Silent())
    repack(earlier / "int8", tmp_path / "set", report=Silent())
    with pytest.raises(MismatchError):
        repack(earlier / "fp16", tmp_path / "set", report=Silent())
    for option in ({"codec": "int8"}, {"fidelity": 0.99}, {"lossy_source": True}):
        with pytest.raises(SettingsError, match="keeps its codec"):
            recode(earlier / "klt", tmp_path / "other", repack=True, **option)
    assert not (tmp_path / "other").exists()
