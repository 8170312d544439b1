"""The live audit: undamaged sets pass, latents of other views fail."""

from __future__ import annotations

import pytest
import torch

from cae2pipe.errors import MismatchError, TeacherError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.verify import verify_live
from cae2pipe.targets.auditing import audit, choose
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher


@pytest.fixture
def teacher(target_root, extract_settings):
    return load_teacher(extract_settings().teacher, torch.device("cpu"))


def test_views_are_chosen_once_each_and_differ_by_seed(target_root) -> None:
    targets = TargetSet(target_root)
    stored = {
        (name, block, position)
        for (name, block), positions in choose(targets, 10_000, 0).items()
        for position in positions
    }
    assert len(stored) == 300, "all of them, where more are asked for than there are"
    assert sum(map(len, choose(targets, 7, 0).values())) == 7
    assert choose(targets, 7, 0) == choose(targets, 7, 0) != choose(targets, 7, 1)


def test_a_sound_set_reaches_its_fidelity(target_root, teacher) -> None:
    result = audit(TargetSet(target_root), teacher, 40, report=Silent())
    assert result.sound
    assert result.views == 40
    assert result.raw == pytest.approx(result.expected, abs=2e-4)
    assert result.worst <= result.raw


@pytest.mark.parametrize("fidelity", [0.7, 0.97])
def test_coarse_sets_are_sound_in_every_view(target_root, extract_settings, teacher, tmp_path, fidelity) -> None:
    # The worst of many views is below the mean of all by more than a teacher's rounding.
    settings = extract_settings(codec={"fidelity": fidelity}, views=1)
    extract_targets(target_root / "shards", tmp_path / "set", settings, report=Silent())
    result = audit(TargetSet(tmp_path / "set"), teacher, 10_000, report=Silent())
    assert result.sound


def test_latents_of_other_views_are_found(target_root, teacher, monkeypatch) -> None:
    targets = TargetSet(target_root)
    reader = targets.reader

    def swapped(name: str, *more):
        mine, other = reader(name), reader(name.replace("v00", "vxx").replace("v01", "v00").replace("vxx", "v01"))
        monkeypatch.setattr(mine, "records", other.records)
        return mine

    monkeypatch.setattr(targets, "reader", swapped)
    assert not audit(targets, teacher, 40, report=Silent()).sound


def test_the_teacher_must_be_the_sets_own(target_root, extract_settings, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    weights = extract_settings().teacher.weights
    assert verify_live(target_root, 5, weights, device="cpu", report=Silent()).sound
    with pytest.raises(TeacherError) as caught:
        verify_live(target_root, 5, None, device="cpu", report=Silent())
    assert "--teacher-weights" in caught.value.fix
    other = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="not the weights"):
        verify_live(target_root, 5, tmp_path / "other.safetensors", device="cpu", report=Silent())
