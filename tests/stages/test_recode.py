"""Recoding: the latents of an fp16 set with another codec, without the teacher and reproducible to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.cli import app
from cae2pipe.config.extract import CodecSettings
from cae2pipe.errors import BadInputError, DamageError, ManifestError, MismatchError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.repair import repair
from cae2pipe.stages.verify import verify
from cae2pipe.targets import stored_calibration
from cae2pipe.targets.calibration import Calibration
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, edit_manifest, snapshot

KLT = CodecSettings(name="klt", fidelity=0.999, calibration=64)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory, photos, extract_settings) -> Path:
    out = tmp_path_factory.mktemp("fp16") / "set"
    extract_targets(photos, out, extract_settings(codec={"name": "fp16"}), report=Silent())
    return out


def tokens(root: Path, name: str) -> torch.Tensor:
    targets = TargetSet(root)
    reader = targets.reader(name)
    decode = targets.layout.codec.decode
    return torch.cat([decode(as_tensors(reader.arrays(block))) for block in range(reader.blocks)])


def test_a_set_of_another_default_is_resumed_with_its_own(fp16, tmp_path):
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    before = contents(tmp_path / "set")
    recode(fp16, tmp_path / "set", CodecSettings(name="klt", calibration=64), report=Silent())
    assert contents(tmp_path / "set") == before
    with pytest.raises(MismatchError, match=r"codec\.fidelity"):
        recode(fp16, tmp_path / "set", CodecSettings(fidelity=0.97, calibration=64), report=Silent())


def test_what_comes_out_is_what_an_extraction_would_have_made(fp16, target_root, tmp_path):
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    made, extracted = TargetSet(tmp_path / "set"), TargetSet(target_root)
    assert made.artifact.complete
    assert made.stores.keys() == extracted.stores.keys()
    assert made.fidelity()["mean"] == pytest.approx(extracted.fidelity()["mean"], abs=1e-5)
    assert made.bytes_per_view()["latents"] == pytest.approx(extracted.bytes_per_view()["latents"], rel=0.01)
    for name in made.stores:
        one, other = made.reader(name), extracted.reader(name)
        assert one.records().keys == other.records().keys
        assert np.array_equal(one.records().draws, other.records().draws)
        assert one.jpegs(0) == other.jpegs(0)
        for array in ("norms", "attention"):
            assert np.array_equal(one.arrays(0)[array], other.arrays(0)[array])
        cosine = torch.cosine_similarity(tokens(fp16, name), tokens(made.root, name), dim=-1)
        assert float(cosine.mean()) > 0.9988
        assert float(cosine.mean()) == pytest.approx(made.stores[name]["fidelity"]["mean"], abs=1e-6)
    assert verify(made.root, Silent()).problems == []


def test_the_facts_are_saved_before_the_codec(fp16, tmp_path, monkeypatch):
    """A codec without them would count as a finished calibration."""
    write, seen = stored_calibration.write_calibration, []

    def watched(path: Path, calibrations: Mapping[str, Calibration]) -> None:
        artifact = open_artifact(tmp_path / "set")
        seen.append(("codec" in artifact.facts, "codec" in artifact.units))
        write(path, calibrations)

    monkeypatch.setattr(stored_calibration, "write_calibration", watched)
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    assert seen == [(True, False)]


@pytest.mark.parametrize("codec", ["int8", "fp16", "klt"])
def test_any_number_of_workers_and_a_second_run(fp16, tmp_path, codec):
    settings = CodecSettings(name=codec, fidelity=0.99, calibration=64)
    recode(fp16, tmp_path / "a", settings, report=Silent(), workers=1)
    recode(fp16, tmp_path / "b", settings, report=Silent(), workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before, report = snapshot(tmp_path / "a"), Silent()
    recode(fp16, tmp_path / "a", settings, report=report)
    assert snapshot(tmp_path / "a") == before
    assert report.lines[0].startswith("nothing to do")


def test_fp16_to_fp16_loses_nothing(fp16, tmp_path):
    recode(fp16, tmp_path / "set", CodecSettings(name="fp16", calibration=64), report=Silent())
    assert TargetSet(tmp_path / "set").fidelity()["p1"] > 0.999999


class Stop(Silent):
    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 64, 130, 290])
def test_broken_off_and_gone_on_with(fp16, tmp_path, after):
    recode(fp16, tmp_path / "whole", KLT, report=Silent())
    with pytest.raises(KeyboardInterrupt):
        recode(fp16, tmp_path / "broken", KLT, report=Stop(after))
    recode(fp16, tmp_path / "broken", KLT, report=Silent())
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_source_that_has_grown(photos, tmp_path, extract_settings):
    settings = extract_settings(codec={"name": "fp16"}, views=1)
    extract_targets(photos, tmp_path / "fp16", settings, report=Silent())
    recode(tmp_path / "fp16", tmp_path / "set", KLT, report=Silent())
    before = snapshot(tmp_path / "set")
    extract_targets(photos, tmp_path / "fp16", extract_settings(codec={"name": "fp16"}, views=2), report=Silent())
    recode(tmp_path / "fp16", tmp_path / "set", KLT, report=Silent())
    after = snapshot(tmp_path / "set")
    assert TargetSet(tmp_path / "set").views == 2
    assert all(after[name] == before[name] for name in before if name != "manifest.json")


def test_lossy_sources(target_root, tmp_path):
    with pytest.raises(BadInputError, match="klt") as caught:
        recode(target_root, tmp_path / "set", KLT, report=Silent())
    assert "--lossy-source" in caught.value.fix
    assert not (tmp_path / "set").exists()
    recode(target_root, tmp_path / "set", CodecSettings(name="int8"), report=Silent(), lossy_source=True)
    assert TargetSet(tmp_path / "set").layout.codec.name == "int8"


def test_what_does_not_fit_is_refused(fp16, photos, tmp_path, extract_settings):
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    before = snapshot(tmp_path / "set")
    with pytest.raises(MismatchError, match=r"codec\.fidelity"):
        recode(fp16, tmp_path / "set", KLT.model_copy(update={"fidelity": 0.99}), report=Silent())
    with pytest.raises(MismatchError, match="recoded"):
        extract_targets(photos, tmp_path / "set", extract_settings(codec={"calibration": 64}), report=Silent())
    assert snapshot(tmp_path / "set") == before
    for inside in (fp16 / "sub", fp16):
        with pytest.raises((BadInputError, MismatchError)):
            recode(fp16, inside, KLT, report=Silent())
    assert not (fp16 / "sub").exists()


def test_a_damaged_source_leaves_nothing_damaged(fp16, tmp_path):
    shutil.copytree(fp16, tmp_path / "fp16")
    tar = tmp_path / "fp16/images/000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        recode(tmp_path / "fp16", tmp_path / "set", KLT, report=Silent())
    assert "images/000001" in caught.value.where
    assert not (tmp_path / "set/images/000001.tar").exists()


@pytest.mark.parametrize("field", ["zarr", "tar", "files", "name"])
def test_a_hostile_set_deletes_and_overwrites_nothing_outside(fp16, tmp_path, field):
    source, precious = tmp_path / "fp16", tmp_path / "precious"
    shutil.copytree(fp16, source)
    shutil.copytree(source / "latents/v00/000000.zarr", precious)
    units = json.loads((source / "manifest.json").read_text())["units"]
    unit = units["v00/000000"]
    if field == "name":
        units["../../precious"] = units.pop("v00/000000")
    elif field == "files":
        entries = {f"../precious/{path.split('.zarr/')[1]}": entry for path, entry in unit["files"].items()}
        unit["files"] = entries
    else:
        unit[field] = "latents/../../precious"
    edit_manifest(source, units=units)
    before = contents(tmp_path)
    with pytest.raises(ManifestError, match=r"units\."):
        recode(source, tmp_path / "out", KLT, report=Silent())
    assert contents(tmp_path) == before


def test_linked_folders_of_the_output_are_not_written_through(fp16, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"1")
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    shutil.rmtree(tmp_path / "set" / "latents")
    (tmp_path / "set" / "latents").symlink_to(tmp_path / "outside")
    with pytest.raises(BadInputError, match="symbolic link"):
        recode(fp16, tmp_path / "set", KLT, report=Silent())
    assert contents(tmp_path / "outside") == {"precious": b"1"}


def test_repair_goes_by_the_set_it_came_from(fp16, tmp_path):
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    before = contents(tmp_path / "set")
    for name in (
        "latents/v01/000001.zarr/patches/symbols/c/0/0/0/0",
        "images/000000.tar",
        "codec.zarr/patches/mean/c/0",
    ):
        # A new file, since the tar is a hard link to the source's.
        data = bytearray((tmp_path / "set" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "set" / name).unlink()
        (tmp_path / "set" / name).write_bytes(data)
    repair(verify(tmp_path / "set", Silent()), Silent(), source=fp16)
    assert contents(tmp_path / "set") == before


def test_a_recoded_set_trains(fp16, tmp_path, pretrain_settings):
    recode(fp16, tmp_path / "set", KLT, report=Silent())
    pretrain(tmp_path / "set", tmp_path / "run", pretrain_settings(), report=Silent())
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_the_command_line(fp16, target_root, tmp_path):
    run = CliRunner().invoke
    assert run(app, ["recode", str(fp16), str(tmp_path / "set"), "--fidelity", "0.99"]).exit_code == 0
    assert TargetSet(tmp_path / "set").fidelity()["mean"] == pytest.approx(0.99, abs=0.002)
    assert run(app, ["recode", str(target_root), str(tmp_path / "other")]).exit_code == 2
    assert run(app, ["recode", str(fp16), str(tmp_path / "other"), "--fidelity", "1.5"]).exit_code == 2
