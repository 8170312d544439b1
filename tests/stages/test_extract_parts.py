"""Extraction divided among parts, ranks and machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.errors import BadInputError, LockedError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets import calibrating, missing
from cae2pipe.targets.paths import CODEC
from cae2pipe.targets.target_set import TargetSet
from tests.conftest import contents
from tests.ranks import command


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_parts_make_what_one_process_makes(target_root, photos, tmp_path, extract_settings, order) -> None:
    out = tmp_path / "set"
    first, second = order
    extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(first, 2))
    partial = TargetSet(out)
    assert not partial.artifact.complete
    assert 0 < len(partial.stores) < 6, "a partial set is a set"
    extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(second, 2))
    assert contents(out) == contents(target_root)


def test_a_part_without_shards_and_a_finished_part_do_nothing(photos, tmp_path, extract_settings) -> None:
    out = tmp_path / "set"
    extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(1, 2))
    for part in (WorkShare(1, 2), WorkShare(9, 9)):
        report = Silent()
        extract_targets(photos, out, extract_settings(), report=report, part=part)
        assert any("nothing to do" in line for line in report.lines)


def test_an_overlapping_part_is_refused_while_the_other_runs(photos, tmp_path, extract_settings) -> None:
    out = tmp_path / "set"
    with writing(out, WorkShare(1, 2)), pytest.raises(LockedError, match="part 1/2, which overlaps part 3/4"):
        extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(3, 4))


def test_the_calibration_alone_can_be_made_first(target_root, photos, tmp_path, extract_settings) -> None:
    out = tmp_path / "set"
    extract_targets(photos, out, extract_settings(), report=Silent(), calibrate_only=True)
    assert list(open_artifact(out).units) == [CODEC]
    extract_targets(photos, out, extract_settings(), report=Silent())
    assert contents(out) == contents(target_root)


def test_parts_that_cannot_agree_are_told_to_calibrate_first(photos, tmp_path, extract_settings, monkeypatch) -> None:
    out = tmp_path / "set"
    monkeypatch.setattr(calibrating, "can_lock", lambda root: False)
    with pytest.raises(BadInputError, match="cannot agree") as caught:
        extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(1, 2))
    assert "--calibrate-only" in caught.value.fix
    extract_targets(photos, out, extract_settings(), report=Silent(), calibrate_only=True)
    extract_targets(photos, out, extract_settings(), report=Silent(), part=WorkShare(1, 2))


def test_what_does_not_fit_the_disk_is_not_begun(photos, tmp_path, extract_settings, monkeypatch) -> None:
    out = tmp_path / "set"
    monkeypatch.setattr(missing, "free_bytes", lambda path: 1000)
    with pytest.raises(BadInputError, match=r"need about .* and 1 kB are free"):
        extract_targets(photos, out, extract_settings(), report=Silent())
    assert list(open_artifact(out).units) == [CODEC], "nothing but the calibration was made"


def test_ranks_make_what_one_process_makes(target_root, photos, tmp_path, extract_settings) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(extract_settings().model_dump(mode="json")))
    out = tmp_path / "set"
    done = command("extract-targets", photos, out, "--config", config)
    assert done.codes == [0, 0], done.stderr
    assert contents(out) == contents(target_root)
    assert Path(out / "manifest.json").read_bytes() == (target_root / "manifest.json").read_bytes()
