"""Sets that list their pixels by digest and do not hold them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.storage import to_path
from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.cli import app
from cae2pipe.config.extract import CodecSettings, ExtractSettings
from cae2pipe.errors import BadInputError, DamageError, ManifestError, MismatchError, SettingsError
from cae2pipe.loading.target_batches import TargetBatches
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.copy_set import copy_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.repair import repair
from cae2pipe.stages.report_targets import report_targets
from cae2pipe.stages.verify import verify
from cae2pipe.targets import missing
from cae2pipe.targets.stored_source import StoredSource
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, edit_manifest

KINDS = ("replayed", "stored")


class Sets(NamedTuple):
    """The second teacher's set of the views of ``source``, with pixels and by reference, and its settings."""

    source: Path
    whole: Path
    referring: Path
    settings: ExtractSettings


@pytest.fixture(scope="module")
def sets(extract_settings, second_file, target_root, stored_root, tmp_path_factory) -> Callable[[str], Sets]:
    @functools.cache
    def made(kind):
        source = target_root if kind == "replayed" else stored_root
        settings = extract_settings(
            teacher={"weights": str(second_file), "name": "second"}, view={"pixels": kind}, codec={"name": "fp16"}
        )
        out = tmp_path_factory.mktemp(kind)
        extract_targets(source, out / "whole", settings, report=Silent())
        extract_targets(source, out / "referring", settings, report=Silent(), by_reference=True)
        return Sets(source, out / "whole", out / "referring", settings)

    return made


def latents_of(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name.startswith(("latents/", "codec"))}


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_latents_alone(sets, kind):
    _, whole, referring, _ = sets(kind)
    files = contents(referring)
    assert latents_of(referring) == latents_of(whole)
    assert files.keys() == {*latents_of(whole), "manifest.json"}
    artifact, other = TargetsArtifact.open(referring), TargetsArtifact.open(whole)
    assert artifact.complete
    assert (artifact.format, other.format) == (5, 4)
    assert artifact.fingerprint == other.fingerprint
    facts = inspect_folder(referring)
    pixels = [name for name in contents(whole) if name.startswith(("images/", "views/"))]
    assert facts["pixels_elsewhere"]["files"] == len(pixels)
    assert facts["pixels_elsewhere"]["bytes"] == sum((whole / name).stat().st_size for name in pixels)
    assert facts["bytes_per_view"]["pixels"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_as_the_whole_set(sets, kind):
    source, whole, referring, _ = sets(kind)
    one, other = TargetSet(referring, pixels=source), TargetSet(whole)
    assert len(one) == len(other)
    for index in (0, 70, -1):
        assert np.array_equal(one[index].pixels, other[index].pixels)
        assert np.array_equal(one[index].tokens, other[index].tokens)
    for mine, theirs in zip(TargetBatches(one, batch_size=50), TargetBatches(other, batch_size=50), strict=True):
        assert mine.keys == theirs.keys
        assert torch.equal(mine.pixels, theirs.pixels)
        assert torch.equal(mine.targets, theirs.targets)


def test_a_run_is_the_same(sets, pretrain_settings, tmp_path):
    source, whole, referring, _ = sets("replayed")
    pretrain(whole, tmp_path / "whole", pretrain_settings(stop_after=2), report=Silent())
    data = {"pixels": str(source)}
    pretrain(referring, tmp_path / "run", pretrain_settings(stop_after=2, data=data), report=Silent())
    runs = [contents(tmp_path / name) for name in ("whole", "run")]
    checkpoints = [{n: data for n, data in run.items() if n.startswith("checkpoints")} for run in runs]
    assert checkpoints[0]
    assert checkpoints[0] == checkpoints[1]
    assert runs[0]["manifest.json"] == runs[1]["manifest.json"]
    with pytest.raises(SettingsError, match="holds its pixels itself"):
        pretrain(whole, tmp_path / "whole", pretrain_settings(stop_after=2, data=data), report=Silent())


def test_without_the_folder_every_reader_of_pixels_says_what_to_give(sets, pretrain_settings, tmp_path):
    _, _, referring, settings = sets("stored")
    readers = {
        "pretrain": lambda out: pretrain(referring, out, pretrain_settings(), report=Silent()),
        "report": lambda out: report_targets(referring, out, report=Silent()),
        "verify": lambda out: verify(referring, Silent()),
        "extract": lambda out: extract_targets(referring, out, settings, report=Silent()),
        "batches": lambda out: TargetBatches(referring),
        "view": lambda out: TargetSet(referring)[0],
    }
    for name, read in readers.items():
        with pytest.raises(SettingsError, match="holds latents alone") as caught:
            read(tmp_path / name)
        assert "data.pixels" in str(caught.value)
        assert "--pixels" in str(caught.value)
        assert not (tmp_path / name).exists()


def test_python_functions_take_the_pixels_that_an_open_set_knows(sets, pretrain_settings, tmp_path):
    source, _, referring, settings = sets("replayed")
    opened, quiet = TargetSet(referring, pixels=source), {"progress": False}
    chosen = pretrain_settings(epochs=1, optimizer={"warmup_epochs": 0})
    run = cae2pipe.pretrain([opened], tmp_path / "run", config=chosen, **quiet)
    page = cae2pipe.report(run.path, targets=opened, out=tmp_path / "runs", device="cpu", **quiet).page
    assert "Latents of the teacher as colours" in page.read_text()
    assert cae2pipe.report_targets(opened, out=tmp_path / "set", device="cpu", **quiet).page.is_file()
    assert cae2pipe.verify(opened, **quiet).problems == []
    again = cae2pipe.extract_targets(opened, tmp_path / "again", config=settings, by_reference=True, **quiet)
    assert np.array_equal(again[0].pixels, opened[0].pixels)


def test_other_pixels_are_refused(sets, tmp_path):
    source, whole, referring, _ = sets("stored")
    with pytest.raises(SettingsError, match="there is no such folder"):
        TargetSet(referring, pixels=tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="this folder has none of the"):
        TargetSet(referring, pixels=whole / "latents")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    path = other / TargetSet(source).stores["v00/000001"]["tar"]
    data = bytearray(path.read_bytes())
    path.write_bytes(data + b"0")
    with pytest.raises(DamageError, match="instead of"):
        TargetSet(referring, pixels=other)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = verify(referring, Silent(), other)
    assert [problem.where for problem in result.problems] == [str(path)]
    assert not result.bad


def test_it_is_resumed_checked_and_repaired(sets, second_file, tmp_path):
    source, _, referring, settings = sets("replayed")
    out = tmp_path / "set"
    for part in ("2/2", "1/2"):
        extract_targets(source, out, settings, report=Silent(), part=parse_part(part), by_reference=True)
    assert contents(out) == contents(referring)
    assert not verify(out, Silent(), source).problems
    (out / TargetSet(out).stores["v01/000001"]["zarr"] / "samples/c/0/0").unlink()
    result = verify(out, Silent(), source)
    assert result.bad == {"v01/000001"}
    repair(result, Silent(), weights=second_file, workers=0)
    assert contents(out) == contents(referring)
    # The same command without --by-reference goes on by reference.
    extract_targets(source, out, settings, report=Silent())
    assert contents(out) == contents(referring)


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_source_it_gives_the_whole_set(sets, kind, tmp_path):
    source, whole, referring, settings = sets(kind)
    out = tmp_path / "set"
    extract_targets(referring, out, settings, report=Silent(), pixels=source)
    assert contents(out) == contents(whole)
    with pytest.raises(MismatchError, match="holds its pixels itself"):
        extract_targets(source, out, settings, report=Silent(), by_reference=True)


def test_originals_are_no_source_of_it(sets, target_root, tmp_path):
    settings = sets("replayed").settings
    with pytest.raises(SettingsError, match="a set by reference is made from a target set"):
        extract_targets(target_root / "shards", tmp_path / "set", settings, report=Silent(), by_reference=True)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_recoded_set_are_by_reference(sets, kind, tmp_path):
    source, whole, referring, _ = sets(kind)
    copy_set(referring, tmp_path / "copy", report=Silent())
    assert contents(tmp_path / "copy") == contents(referring)
    codec = CodecSettings(name="int8")
    recode(referring, tmp_path / "recoded", codec, report=Silent(), workers=0)
    assert TargetSet(tmp_path / "recoded", pixels=source)[3].pixels.tolist() == TargetSet(whole)[3].pixels.tolist()
    assert not verify(tmp_path / "recoded", Silent(), source).problems
    with pytest.raises(MismatchError, match="the other is by reference"):
        recode(whole, tmp_path / "recoded", codec, report=Silent(), workers=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_may_be_behind_a_url(sets, kind):
    source, whole, referring, _ = sets(kind)
    remote = to_path(f"memory://referred/{kind}")
    for name, data in contents(source).items():
        (remote / name).write_bytes(data)
    expected = next(iter(TargetBatches(whole, batch_size=150)))
    targets = TargetSet(referring, pixels=str(remote))
    found = next(iter(TargetBatches(targets, batch_size=150)))
    assert torch.equal(found.pixels, expected.pixels)
    # And an added teacher there, whose pixels need not be named.
    for name, data in contents(referring).items():
        (remote / "teachers/second" / name).write_bytes(data)
    added = TargetSet(remote / "teachers/second")
    assert added.pixels_root == remote
    assert torch.equal(next(iter(TargetBatches(added, batch_size=150))).pixels, expected.pixels)
    assert list(inspect_folder(remote)["added_teachers"]) == ["second"]
    (remote / TargetSet(source).stores["v00/000000"]["tar"]).write_bytes(b"other")
    with pytest.raises(DamageError, match="the file has 5 bytes instead of"):
        TargetSet(remote / "teachers/second")


def test_entries_that_do_not_fit_their_unit_are_refused(sets, tmp_path):
    for kind, name, change in (
        ("stored", "v00/000000", lambda unit, other: unit["pixels"].update(other["pixels"])),
        ("stored", "v00/000000", lambda unit, other: unit["files"].update(unit["pixels"])),
        ("replayed", "images/000000", lambda unit, other: unit["pixels"].popitem()),
        ("replayed", "images/000000", lambda unit, other: unit["files"].update(unit["pixels"])),
    ):
        root = Path(shutil.copytree(sets(kind).referring, tmp_path / "set", dirs_exist_ok=True))
        units = json.loads((root / "manifest.json").read_text())["units"]
        change(units[name], units[name.replace("000000", "000001")])
        edit_manifest(root, units=units)
        with pytest.raises(ManifestError, match=rf"units.{name}: (pixels|files)"):
            TargetSet(root)


def test_pixels_take_no_room_unless_they_are_copied(sets, monkeypatch):
    source, whole, referring, _ = sets("replayed")
    made_from = StoredSource.of(TargetSet(source))
    lacking = [missing.MissingUnits(shard, (0, 1), images=True) for shard in made_from.shards]
    artifact = TargetsArtifact.open(whole)
    latents = artifact.facts["codec"]["expected_bytes"]["latents"] * 2 * made_from.images
    monkeypatch.setattr(missing, "free_bytes", lambda path: latents)
    missing.check_space(artifact, made_from, lacking)
    monkeypatch.setattr(missing, "on_one_disk", lambda one, other: False)
    missing.check_space(TargetsArtifact.open(referring), made_from, lacking)
    with pytest.raises(BadInputError, match="are free"):
        missing.check_space(artifact, made_from, lacking)


@pytest.mark.parametrize(("words", "said"), [("SET", "OUT is missing"), ("SET OUT --add", "--add takes no OUT")])
def test_the_command_says_whether_it_takes_a_folder(words, said, target_root, tmp_path):
    line = [{"SET": str(target_root), "OUT": str(tmp_path / "out")}.get(word, word) for word in words.split()]
    result = CliRunner().invoke(app, ["extract-targets", *line])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
