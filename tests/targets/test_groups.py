"""Groups of latents besides the patches: a teacher's summary, and the tokens of other blocks."""

from __future__ import annotations

import itertools
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.config.extract import CodecSettings
from cae2pipe.errors import DamageError, ManifestError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.recode import recode
from cae2pipe.stages.repair import repair
from cae2pipe.stages.report_targets import report_targets
from cae2pipe.stages.verify import verify, verify_live
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, edit_manifest
from tests.pooling_teacher import DIM, LAYERS, WIDTH, extract_pooling, pooling, pooling_teacher

SNIPPET = Path(__file__).parents[2] / "docs" / "read_with_zarr.py"
GROUPS = ["patches", "layer-01", "layer-02", "summary"]


def test_all_groups_are_those_of_the_teacher(summary_root) -> None:
    """Against a plain forward pass on the set's own pixels."""
    targets, teacher = TargetSet(summary_root, "torch"), pooling_teacher()
    assert list(targets.groups) == GROUPS
    for index in (0, 69, 70, 299):
        view = targets[index]
        output = teacher(view.pixels.permute(2, 0, 1).unsqueeze(0))
        pairs = [(view.summary, view.summary_norm, output.summary[0]), (view.tokens, view.norms, output.tokens[0])]
        pairs += [(view.layers[n], view.layer_norms[n], output.layers[n][0]) for n in LAYERS]
        for stored, norm, true in pairs:
            assert stored.shape == true.shape
            assert float(torch.cosine_similarity(stored, true, dim=-1).mean()) > 0.995
            torch.testing.assert_close(torch.as_tensor(norm), true.norm(dim=-1), rtol=1e-3, atol=0)
    assert view.summary.shape == (WIDTH,)
    assert sorted(view.layers) == list(LAYERS)
    assert isinstance(TargetSet(summary_root)[0].summary, np.ndarray)


def test_a_set_without_them_has_none(target_root) -> None:
    view = TargetSet(target_root)[0]
    assert (view.summary, view.summary_norm, view.layers, view.layer_norms) == (None, None, {}, {})


def test_each_reaches_its_fidelity_with_its_own_calibration(summary_root) -> None:
    targets = TargetSet(summary_root)
    spreads = [targets.groups[name].calibration.spread for name in GROUPS]
    assert all(not torch.equal(*pair) for pair in itertools.combinations(spreads, 2) if len(pair[0]) == len(pair[1]))
    facts = targets.artifact.facts["codec"]
    for name in GROUPS:
        own = facts if name == "patches" else facts["groups"][name]
        assert own["held_out_fidelity"]["mean"] >= 0.999
        assert own["step"] == targets.groups[name].calibration.step
        assert targets.fidelity(name)["mean"] == pytest.approx(0.999, abs=1e-3)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("codec", ["klt", "int8"])
def test_zarr_alone_reads_them(summary_root, summary_int8, group, codec) -> None:
    root = summary_root if codec == "klt" else summary_int8
    view = TargetSet(root)[3]
    read = runpy.run_path(str(SNIPPET))["read_latents"](str(root), latents=group)[3]
    ours = {"patches": view.tokens, "summary": view.summary, "layer-01": view.layers[1], "layer-02": view.layers[2]}
    np.testing.assert_allclose(read.squeeze(0) if group == "summary" else read, ours[group], atol=1e-6)


def test_parts_kills_and_growth_end_in_the_same_bytes(summary_root, photos, tmp_path, extract_settings) -> None:
    out = extract_pooling(photos, tmp_path / "set", extract_settings(views=1), calibrate_only=True)
    extract_pooling(photos, out, extract_settings(views=1), part=WorkShare(2, 2))
    extract_pooling(photos, out, extract_settings(views=1))
    shutil.rmtree(out / "latents/v00/000001.zarr/summary")
    for part in (1, 2):
        extract_pooling(photos, out, extract_settings(), part=WorkShare(part, 2))
    extract_pooling(photos, out, extract_settings())
    assert contents(out) == contents(summary_root)


@pytest.mark.parametrize("lost", ["latents/v01/000002.zarr/layer-02/norms", "codec.zarr/summary/mean"])
def test_what_is_damaged_is_found_and_made_again(summary_root, photos, tmp_path, lost) -> None:
    root = Path(shutil.copytree(summary_root, tmp_path / "set"))
    path = next(path for path in (root / lost / "c").rglob("*") if path.is_file())
    path.write_bytes(b"x" + path.read_bytes()[1:])
    if "codec" in lost:
        with pytest.raises(DamageError, match="calibration"):
            TargetSet(root)
    else:
        with pytest.raises(DamageError, match="layer-02"):
            TargetSet(root)[299]
    result = verify(root, Silent())
    assert len(result.bad) == 1
    with pooling():
        repair(result, Silent(), device="cpu", workers=0)
    assert contents(root) == contents(summary_root)


def test_the_live_check_covers_every_group(summary_root, monkeypatch) -> None:
    with pooling() as teacher:
        result = verify_live(summary_root, 20, None, device="cpu", report=Silent())
        assert result.sound
        assert list(result.more) == GROUPS[1:]
        head = teacher.model.head.weight
        head.copy_(head.roll(1, 0))
        result = verify_live(summary_root, 20, None, device="cpu", report=Silent())
    assert [name for name, own in result.more.items() if not own.sound] == ["summary"]
    assert not result.sound


@pytest.fixture(scope="module")
def summary_int8(summary_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recoded") / "set"
    recode(summary_root, out, CodecSettings(name="int8"), report=Silent(), lossy_source=True, workers=2)
    return out


def test_recoding_keeps_every_group(summary_root, summary_int8, tmp_path) -> None:
    old, new = TargetSet(summary_root), TargetSet(summary_int8)
    for index in (0, 150, 299):
        a, b = old[index], new[index]
        np.testing.assert_allclose(a.summary / np.linalg.norm(a.summary), b.summary, atol=6e-3)
        np.testing.assert_allclose(
            a.layers[1] / np.linalg.norm(a.layers[1], axis=-1, keepdims=True), b.layers[1], atol=6e-3
        )
        assert a.summary_norm == b.summary_norm
    assert verify(summary_int8, Silent()).problems == []
    out = Path(shutil.copytree(summary_int8, tmp_path / "set"))
    shutil.rmtree(out / "latents/v00/000002.zarr/summary")
    recode(summary_root, out, CodecSettings(name="int8"), report=Silent(), lossy_source=True, workers=0)
    assert contents(out) == contents(summary_int8)


def test_bytes_are_counted_by_group(summary_root, photos, extract_settings, tmp_path) -> None:
    targets = TargetSet(summary_root)
    by_group = targets.group_bytes_per_view()
    assert list(by_group) == GROUPS
    assert sum(by_group.values()) == pytest.approx(targets.bytes_per_view()["latents"])
    files = contents(summary_root)
    for name, size in by_group.items():
        there = [len(data) for path, data in files.items() if f".zarr/{name}/" in path and "latents/" in path]
        arrays = sum(there) - sum(
            len(d) for p, d in files.items() if p.endswith(f".zarr/{name}/zarr.json") and "latents" in p
        )
        assert size * len(targets) == pytest.approx(arrays)
    assert by_group["summary"] < by_group["patches"] / 2
    shown = inspect_folder(summary_root)["groups"]
    assert shown["summary"]["tokens"] == 1
    assert shown["layer-01"]["dim"] == DIM
    with pooling():
        rows = estimate_targets(photos, extract_settings(), Silent())["codecs"]
    klt = next(row for row in rows if row["codec"] == "klt")
    assert set(klt["groups"]) == set(GROUPS)
    assert sum(klt["groups"].values()) == pytest.approx(klt["latents"], abs=len(GROUPS))
    page = report_targets(summary_root, tmp_path, report=Silent()).page.read_text()
    assert "summary/norms" in page
    assert f"a summary of {WIDTH} dimensions" in page


def test_a_manifest_must_name_the_groups_of_its_teacher(summary_root, tmp_path) -> None:
    root = Path(shutil.copytree(summary_root, tmp_path / "set"))
    groups = open_artifact(root).facts["groups"]
    edit_manifest(root, groups={name: entry for name, entry in groups.items() if name != "layer-02"})
    with pytest.raises(ManifestError, match=r"groups\.layer-02"):
        TargetSet(root)
    edit_manifest(root, groups={**groups, "summary": {**groups["summary"], "dim": 7}})
    with pytest.raises(ManifestError, match=r"groups\.summary\.dim"):
        TargetSet(root)
