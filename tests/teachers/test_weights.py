from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cae2pipe.errors import TeacherError
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, -2.0])}


def test_all_wrappings_hold_the_same_weights(state, tmp_path):
    save_file(state, tmp_path / "0.safetensors")
    torch.save(state, tmp_path / "1.pth")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "2.pt")
    torch.save({"model": state, "epoch": 3}, tmp_path / "3.bin")
    torch.save(state, tmp_path / "4.pth", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        read = read_weights(path)
        assert read.keys() == state.keys(), path.name
        assert all(torch.equal(read[name], state[name]) for name in state), path.name


class Attack:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda attack: attack, lambda attack: {"state_dict": {"a": attack}}])
def test_a_pickle_that_needs_code_is_refused(tmp_path, wrap):
    marker = tmp_path / "it-ran"
    torch.save(wrap(Attack(marker)), tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(wrap(Attack(marker))))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(TeacherError, match=r"more than tensors|cannot be read"):
            read_weights(tmp_path / name)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(TeacherError, match="TorchScript"):
        read_weights(tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_broken_or_missing_file_is_named(state, tmp_path, name):
    path = tmp_path / name
    with pytest.raises(TeacherError, match="no such weights file"):
        read_weights(path)
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:30], b"", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(TeacherError) as refused:
            read_weights(path)
        assert refused.value.where == str(path)
        assert refused.value.fix


@pytest.mark.parametrize("content", [torch.zeros(2), {"a": 3}, {1: torch.zeros(2)}, {"model": {"a": [1]}}])
def test_a_file_without_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match="does not hold tensors by name"):
        read_weights(tmp_path / "w.pt")


def test_loading_is_strict(state):
    module = nn.ModuleDict({"a": nn.Linear(3, 2)})
    for wrong, message in (
        ({"a.weight": state["a.weight"]}, "1 missing"),
        (state | {"b": torch.zeros(1)}, "1 unexpected"),
        (state | {"a.bias": torch.zeros(3)}, r"1 of another shape .*\(3,\) for \(2,\)"),
    ):
        with pytest.raises(TeacherError, match=message):
            load_strictly(module, wrong, where="here")
    load_strictly(module, state, where="here")
    assert torch.equal(module["a"].weight, state["a.weight"])


def test_the_digest_follows_values_not_counters():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    digest = weights_digest(module)
    assert len(digest) == 64
    module[1].num_batches_tracked += 1
    assert weights_digest(module) == digest
    module[1].running_mean[0] += 1e-7
    assert weights_digest(module) != digest


def test_the_digest_follows_names_and_types():
    linear = nn.Linear(2, 2)
    digests = {weights_digest(nn.ModuleDict({name: linear})) for name in ("a", "b")}
    digests.add(weights_digest(nn.ModuleDict({"a": linear.half()})))
    assert len(digests) == 3
