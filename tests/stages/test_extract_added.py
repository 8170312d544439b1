"""Teachers that are added to a target set."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cae2pipe.api.targets import estimate_targets
from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.cli import app
from cae2pipe.config.extract import CodecSettings
from cae2pipe.errors import BadInputError, MismatchError, ReadOnlyError, SettingsError
from cae2pipe.loading.joining import join_sets
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.add_teacher import add_teacher
from cae2pipe.stages.copy_set import copy_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.repair import repair
from cae2pipe.stages.report_targets import report_targets
from cae2pipe.stages.verify import verify
from cae2pipe.targets.paths import is_store
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents, snapshot


@pytest.fixture(scope="module")
def settings(extract_settings, second_file):
    def of(teacher=None, **over):
        return extract_settings(teacher=teacher or {"weights": str(second_file), "name": "second"}, **over)

    return of


def add(root, settings, **options):
    return add_teacher(root, settings, report=Silent(), **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory, target_root) -> Path:
    """A set without a shard set inside, to which nothing is added yet."""
    out = tmp_path_factory.mktemp("first") / "set"
    return Path(shutil.copytree(target_root, out, ignore=shutil.ignore_patterns("shards", ".locks")))


@pytest.fixture(scope="module")
def both(original, settings, tmp_path_factory) -> Path:
    """The set with an added teacher. Read-only."""
    out = Path(shutil.copytree(original, tmp_path_factory.mktemp("both") / "set"))
    add(out, settings())
    return out


@pytest.fixture
def copy(both, tmp_path) -> Path:
    return Path(shutil.copytree(both, tmp_path / "set"))


def test_it_has_an_identity_of_its_own_and_the_first_set_stays(both, original):
    files = contents(both)
    inside = {name for name in files if name.startswith("teachers/second/")}
    assert {name: data for name, data in files.items() if name not in inside} == contents(original)
    assert not any(name.endswith((".tar", ".jpg")) for name in inside)
    added = TargetSet(both / "teachers/second")
    assert added.artifact.complete
    assert added.artifact.fingerprint != TargetSet(both).artifact.fingerprint
    assert (added[5].pixels == TargetSet(both)[5].pixels).all()
    shown = inspect_folder(both)["added_teachers"]
    assert list(shown) == ["second"]
    assert shown["second"]["complete"]
    assert shown["second"]["stores"] == len(added.stores)


def test_the_same_command_does_nothing_and_growth_is_followed(copy, settings, extract_settings, target_root):
    before = snapshot(copy)
    add(copy, settings())
    assert snapshot(copy) == before
    # Growing the first set leaves the added one as it is.
    extract_targets(target_root / "shards", copy, extract_settings(views=3), report=Silent())
    inside = {name: data for name, data in snapshot(copy).items() if name.startswith("teachers/")}
    assert inside == {name: data for name, data in before.items() if name.startswith("teachers/")}
    grown = settings(views=3)
    for part in ("1/2", "2/2"):
        made = add(copy, grown, part=parse_part(part))
    assert made.complete
    assert sum(map(is_store, made.units)) == 3 * 3
    assert not verify(copy, Silent()).problems


def test_an_interrupted_addition_ends_in_the_same_bytes(both, original, settings, tmp_path, monkeypatch):
    out = Path(shutil.copytree(original, tmp_path / "set"))
    added, stores = TargetsArtifact.add, []

    def interrupted(self, name, unit):
        if is_store(name):
            stores.append(name)
            if len(stores) == 2:
                raise KeyboardInterrupt
        added(self, name, unit)

    with monkeypatch.context() as patch:
        patch.setattr(TargetsArtifact, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add(out, settings())
    assert not TargetsArtifact.open(out / "teachers/second").complete
    add(out, settings())
    assert contents(out) == contents(both)


def test_runs_begun_before_resume_and_new_ones_take_both(copy, pretrain_settings, tmp_path):
    run, joint = tmp_path / "run", tmp_path / "joint"
    shutil.move(copy / "teachers", tmp_path / "teachers")
    pretrain(copy, run, pretrain_settings(stop_after=1), report=Silent())
    before = (run / "manifest.json").read_bytes()
    shutil.move(tmp_path / "teachers", copy / "teachers")
    pretrain(copy, run, pretrain_settings(stop_after=2), report=Silent())
    assert inspect_folder(run)["steps"] == 2
    assert (run / "manifest.json").read_bytes() == before
    pretrain([copy, copy / "teachers/second"], joint, pretrain_settings(stop_after=1), report=Silent())
    assert list(inspect_folder(joint)["teachers"])[1] == "second"


def test_teachers_that_are_there_are_refused(copy, settings, extract_settings, second_file):
    before = snapshot(copy)
    with pytest.raises(MismatchError, match="this is the set's own teacher"):
        add(copy, extract_settings())
    with pytest.raises(MismatchError, match=r"already added, as second, with settings.teacher.name = 'second'"):
        add(copy, settings({"weights": str(second_file), "name": "other"}))
    with pytest.raises(SettingsError, match="this is the set of an added teacher"):
        add(copy / "teachers/second", settings())
    with pytest.raises(BadInputError, match="give --add to add a teacher"):
        extract_targets(copy, copy / "teachers/x", settings(), report=Silent())
    with pytest.raises(MismatchError, match=r"settings.codec.fidelity = 0.999, and 0.9 is requested") as caught:
        add(copy, settings(codec={"fidelity": 0.9}))
    assert caught.value.fix.startswith("--set codec.fidelity=0.999 resumes it; or remove this folder to add")
    assert snapshot(copy) == before


def test_a_set_that_cannot_be_written_gets_no_teacher_but_gives_its_views(original, settings, tmp_path, monkeypatch):
    opened, folder = os.open, original / "teachers/second"

    def read_only(path, *arguments, **options):
        if folder in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(ReadOnlyError, match="cannot be written: Read-only file system") as caught:
            add(original, settings())
    assert caught.value.fix.startswith("give an OUT and --by-reference in place of --add")
    extract_targets(original, tmp_path / "out", settings(), by_reference=True, report=Silent())
    assert len(TargetSet(tmp_path / "out", pixels=original)) == len(TargetSet(original))


def test_what_cannot_be_added_is_refused_before_anything_is_made(copy, settings, tmp_path):
    chosen = settings()
    coarse = chosen.model_copy(update={"teacher": chosen.teacher.model_copy(update={"grid": (1, 1)})})
    before = snapshot(copy)
    for attempt in (lambda: add(copy, coarse), lambda: estimate_targets(copy, config=coarse, add=True, progress=False)):
        with pytest.raises(SettingsError, match="the grid of this teacher is 1 x 1, that of the set 4 x 4") as caught:
            attempt()
        assert "teacher.grid=[4,4]" in caught.value.fix
    with pytest.raises(SettingsError, match="no such target set"):
        estimate_targets(tmp_path / "nothing", config=chosen, add=True, progress=False)
    assert snapshot(copy) == before


def test_other_weights_of_one_name_have_a_folder_of_their_own(copy, settings, teacher_file, tmp_path):
    save_file({name: 1.5 * t for name, t in load_file(teacher_file).items()}, tmp_path / "third.safetensors")
    made = add(copy, settings({"weights": str(tmp_path / "third.safetensors"), "name": "second"}), calibrate_only=True)
    assert made.root.parent == copy / "teachers"
    assert made.root.name.startswith("second-")
    assert add(copy, settings(), calibrate_only=True).root.name == "second"


def test_verify_and_repair_see_added_teachers(copy, both, second_file, settings):
    added = copy / "teachers/second"
    (added / TargetSet(added).stores["v01/000001"]["zarr"] / "samples/c/0/0").unlink()
    result = verify(copy, Silent())
    assert result.inner[0].bad == {"v01/000001"}
    assert len(result.problems) == 1
    repair(result, Silent(), weights=second_file, workers=0)
    assert contents(copy) == contents(both)
    tar = copy / TargetSet(copy).stores["v01/000001"]["tar"]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    for root in (copy, added):
        result = verify(root, Silent())
        assert [problem.where for problem in result.problems] == [str(tar)]
        assert len(result.own) == 1
    tar.unlink()
    page = report_targets(added, copy.parent / "page", report=Silent())
    assert len(page.problems) == 1
    assert str(tar) in page.problems[0]


def test_a_copy_has_them(copy, both, tmp_path):
    result = copy_set(copy, tmp_path / "copy", report=Silent())
    assert result.complete
    assert contents(tmp_path / "copy") == contents(both)
    assert TargetSet(tmp_path / "copy/teachers/second")[0].key
    assert copy_set(copy, tmp_path / "copy", report=Silent()).brought == 0
    copy_set(copy, tmp_path / "one", report=Silent(), views=1)
    assert TargetSet(tmp_path / "one/teachers/second").views == 1


def test_recoding_says_that_added_teachers_stay_behind_and_how_they_follow(both, tmp_path):
    report, out = Silent(), tmp_path / "the recoded"
    codec = CodecSettings(fidelity=0.99, calibration=64)
    recode(both, out, codec, lossy_source=True, report=report, workers=0)
    (line,) = [line for line in report.lines if "added teacher" in line]
    assert line.startswith("not recoded with the set, its added teacher second: cae2pipe recode ")
    again = CliRunner().invoke(app, shlex.split(line.split(": ", 1)[1])[1:])
    assert again.exit_code == 0, again.output
    assert "added teacher" not in again.output
    assert TargetSet(out / "teachers/second").artifact.identity["settings"]["codec"]["fidelity"] == codec.fidelity
    assert list(inspect_folder(out)["added_teachers"]) == ["second"]
    joined = join_sets([TargetSet(out), TargetSet(out / "teachers/second")])
    assert len(joined.main.stores) == len(TargetSet(both).stores)
    assert not verify(out, Silent()).problems
