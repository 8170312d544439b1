"""Target sets are complete, reproducible and resumable."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cae2pipe.artifacts.artifact import TargetsArtifact, open_artifact
from cae2pipe.config.base import build
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import DamageError, ManifestError, MismatchError, TeacherError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets import calibrating, rendering
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, snapshot


def stores(root: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in contents(root).items() if name.startswith(("views/", "latents/", "codec.zarr/"))
    }


def test_the_set_is_complete_and_says_what_it_holds(target_root):
    targets = TargetSet(target_root)
    assert targets.artifact.complete
    assert sorted(targets.stores) == [f"v{v:02d}/{s:06d}" for v in range(2) for s in range(3)]
    assert (targets.images, targets.views) == (150, 2)
    assert targets.classes == ["class0", "class1", "class2"]
    assert targets.fidelity()["mean"] >= 0.9988
    assert targets.bytes_per_view()["fp16"] == 2 * 17 * 17


def test_a_second_run_does_nothing_and_says_so(copy, photos, extract_settings):
    before = snapshot(copy)
    report = Silent()
    extract_targets(photos, copy, extract_settings(), report=report)
    assert snapshot(copy) == before
    assert any("nothing to do" in line for line in report.lines)


def test_workers_and_a_shard_set_as_source_change_nothing(target_root, photos, tmp_path, extract_settings):
    settings = extract_settings(speed={"workers": 2})
    shards = build_shard_set(photos, tmp_path / "shards", settings.shard, report=Silent())
    extract_targets(shards.root, tmp_path / "set", settings, report=Silent())
    assert stores(tmp_path / "set") == stores(target_root)
    assert (tmp_path / "set" / "manifest.json").read_bytes() == (target_root / "manifest.json").read_bytes()


def test_the_number_of_cores_changes_nothing(target_root, photos, tmp_path, extract_settings):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        extract_targets(photos, tmp_path / "set", extract_settings(), report=Silent())
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "set") == contents(target_root)


@pytest.mark.parametrize("pixels", ["stored", "replayed"])
def test_how_many_views_are_rendered_at_once_changes_nothing(
    target_root, stored_root, photos, tmp_path, extract_settings, monkeypatch, pixels
):
    monkeypatch.setattr(rendering, "VIEWS_AT_ONCE", 1)
    extract_targets(photos, tmp_path / "set", extract_settings(view={"pixels": pixels}), report=Silent())
    assert contents(tmp_path / "set") == contents(stored_root if pixels == "stored" else target_root)


def without_defaults(settings: ExtractSettings) -> ExtractSettings:
    """The settings of a command that gives neither views nor a fidelity."""
    values = settings.model_dump(mode="json")
    del values["views"], values["codec"]["fidelity"]
    return build(ExtractSettings, values, "test")


def test_a_set_of_other_defaults_is_resumed_with_its_own(copy, photos, extract_settings):
    begun, given = extract_settings(), without_defaults(extract_settings())
    assert (given.views, given.codec.fidelity) != (begun.views, begun.codec.fidelity)
    before = contents(copy)
    (copy / "latents/v01/000001.zarr/patches/norms/c/0/0").unlink()
    report, said = Silent(), []
    report.log = said.append
    extract_targets(photos, copy, given, report=report)
    assert contents(copy) == before
    assert "using the settings of this set: --views 2 --fidelity 0.999" in said
    # Given values take precedence.
    with pytest.raises(MismatchError, match=r"codec\.fidelity") as caught:
        extract_targets(photos, copy, extract_settings(codec={"fidelity": given.codec.fidelity}), report=Silent())
    assert str(caught.value.fix).startswith("--set codec.fidelity=0.999 resumes it")


def test_a_fidelity_that_means_nothing_to_a_codec_is_not_asked_for_again(photos, tmp_path, extract_settings):
    extract_targets(photos, tmp_path / "set", extract_settings(codec={"name": "fp16"}, views=1), report=Silent())
    given = without_defaults(extract_settings(codec={"name": "fp16"}))
    more = given.model_copy(update={"views": 2})
    more.model_fields_set.add("views")
    extract_targets(photos, tmp_path / "set", more, report=Silent())
    assert TargetSet(tmp_path / "set").views == 2


@pytest.mark.parametrize("lost", ["images/000001.tar", "latents/v01/000001.zarr"])
def test_only_what_was_deleted_is_made_again_and_alike(copy, photos, extract_settings, lost):
    before = snapshot(copy)
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    extract_targets(photos, copy, extract_settings(), report=Silent())
    after = snapshot(copy)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    changed = {name for name in after if after[name][1] != before[name][1]}
    assert changed
    assert all(name.startswith(lost.removesuffix(".tar")) for name in changed)


@pytest.mark.parametrize("damage", ["folder gone", "chunk gone", "bit flipped", "metadata changed", "a file instead"])
def test_a_lost_calibration_is_noticed_and_restored(copy, photos, extract_settings, damage):
    before, folder = contents(copy), copy / "codec.zarr"
    if damage in ("folder gone", "a file instead"):
        shutil.rmtree(folder)
        if damage == "a file instead":
            folder.write_bytes(b"")
    elif damage == "chunk gone":
        (folder / "patches/mean/c/0").unlink()
    else:
        path = folder / ("patches/basis/c/0/0" if damage == "bit flipped" else "patches/mean/zarr.json")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamageError, match="calibration"):
        TargetSet(copy)
    extract_targets(photos, copy, extract_settings(), report=Silent())
    assert contents(copy) == before


def test_views_can_be_added_later(target_root, photos, tmp_path, extract_settings):
    grown = tmp_path / "grown"
    extract_targets(photos, grown, extract_settings(views=1), report=Silent())
    assert TargetSet(grown).views == 1
    first = stores(grown)
    extract_targets(photos, grown, extract_settings(views=2), report=Silent())
    assert stores(grown) == stores(target_root)
    assert first.items() <= stores(grown).items()


@pytest.mark.parametrize("crash_at", [1, 3, 5])
def test_a_broken_off_run_goes_on_to_the_same_bytes(
    target_root, photos, tmp_path, extract_settings, monkeypatch, crash_at
):
    out = tmp_path / "set"
    real_add, count = TargetsArtifact.add, 0

    def add(self: TargetsArtifact, name: str, unit: dict) -> None:
        nonlocal count
        count += 1
        if count == crash_at:
            raise KeyboardInterrupt
        real_add(self, name, unit)

    monkeypatch.setattr(TargetsArtifact, "add", add)
    with pytest.raises(KeyboardInterrupt):
        extract_targets(photos, out, extract_settings(), report=Silent())
    monkeypatch.undo()
    extract_targets(photos, out, extract_settings(), report=Silent())
    assert contents(out) == contents(target_root)


def test_the_journal_of_a_killed_run_counts(target_root, photos, tmp_path, extract_settings, monkeypatch):
    out, save = tmp_path / "set", TargetsArtifact.save
    with monkeypatch.context() as patch:
        # A SIGKILL leaves the journal: the manifest is never written.
        patch.setattr(TargetsArtifact, "save", lambda self, complete=None: None if self.units else save(self))
        extract_targets(photos, out, extract_settings(), report=Silent())
    assert open_artifact(out).units.keys() == open_artifact(target_root).units.keys()
    assert not open_artifact(out).complete


def test_sets_of_later_formats_are_refused(copy):
    assert open_artifact(copy).format == 4
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 6}))
    with pytest.raises(ManifestError, match="format 6, and this version of cae2pipe reads format 5"):
        TargetSet(copy)


def test_manifests_hold_no_paths_times_or_hosts(target_root):
    text = (target_root / "manifest.json").read_text()
    assert str(target_root) not in text
    assert "/tmp" not in text
    manifest = json.loads(text)
    assert manifest["format"] == 4
    assert manifest["fidelity" if "fidelity" in manifest else "codec"]


def test_a_set_without_a_calibration_takes_other_settings(target_root, photos, tmp_path, extract_settings, monkeypatch):
    def fails(*_, **__):
        raise TeacherError("not finite", fix="--set seed=0")

    out = tmp_path / "set"
    with monkeypatch.context() as patched:
        patched.setattr(calibrating, "run_sample", fails)
        with pytest.raises(TeacherError):
            extract_targets(photos, out, extract_settings(seed=1), report=Silent())
    assert TargetsArtifact.open(out).identity["settings"]["seed"] == 1
    extract_targets(photos, out, extract_settings(), report=Silent())
    assert contents(out) == contents(target_root)
