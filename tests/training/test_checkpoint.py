import os

import pytest
import torch
from torch import nn

from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Silent
from cae2pipe.training.checkpoint import checkpoints, load_checkpoint, restore_training, save_checkpoint, training_state

RUN = "f" * 64
LIKE = {"x": torch.zeros(4)}


def save(folder, step, keep=2, run=RUN, for_good=lambda step: False, **state):
    return save_checkpoint(
        folder, step, state or {"x": torch.full((4,), float(step))}, run=run, keep=keep, for_good=for_good
    )


def load(folder, report=None):
    return load_checkpoint(folder, report or Silent(), run=RUN, like=LIKE)


def test_the_newest_and_those_for_good_are_kept(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, for_good=lambda done: done % 4 == 0)
    assert [path.stem for path in checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (4, 8, 9, 10)]


def test_one_changed_byte_is_noticed_and_the_one_before_is_taken(tmp_path):
    like = {"x": torch.zeros(1000)}
    for step in (1, 2):
        path = save(tmp_path, step, x=torch.full((1000,), float(step)))
    data = bytearray(path.read_bytes())
    place = data.index(torch.tensor([2.0, 2.0]).numpy().tobytes()) + 400
    data[place] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["x"].unique().numel() == 2  # torch does not notice
    report = Silent()
    assert load_checkpoint(tmp_path, report, run=RUN, like=like)["x"][0] == 1
    assert any("step-00000002.pt cannot be read" in line for line in report.lines)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_that_was_passed_over_pushes_no_sound_one_out(tmp_path, keep):
    for step in (3, 6):
        save(tmp_path, step)
    (tmp_path / "step-00000006.pt").write_bytes(b"cut off")
    save(tmp_path, 5, keep)
    assert [path.stem for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000005"][-keep:]
    report = Silent()
    assert load(tmp_path, report)["x"][0] == 5
    assert report.lines == []


@pytest.mark.parametrize("name", ["step-backup.pt", "step-00000002 (copy).pt", "step-2.pt", ".tmp-step-00000003.pt"])
def test_files_of_other_names_are_no_checkpoints(tmp_path, name):
    path = save(tmp_path, 1)
    (tmp_path / name).write_bytes(path.read_bytes())
    os.mkfifo(tmp_path / "step-00000009.pt")
    assert checkpoints(tmp_path) == [path]
    save(tmp_path, 2, keep=1)
    assert (tmp_path / name).exists()
    assert load(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "the file is not a dictionary"),
        ({}, "the file has no 'x'"),
        ({"x": torch.zeros(4)}, "the file has no 'step'"),
        ({"x": torch.zeros(4), "step": 1}, "step is 1, not 2"),
        ({"x": torch.zeros(4), "step": "2"}, "step is '2', not 2"),
        ({"x": torch.zeros(5), "step": 2}, r"x is (5,) torch.float32, not (4,) torch.float32"),
        ({"x": torch.zeros(4).half(), "step": 2}, "torch.float16"),
        ({"x": 3, "step": 2}, "x is not a tensor"),
        ({"x": torch.zeros(4), "step": 2, "run": "0" * 64}, "run is '0000"),
    ],
)
def test_what_is_not_of_this_run_is_passed_over(tmp_path, content, problem):
    save(tmp_path, 1)
    torch.save(content, tmp_path / "step-00000002.pt")
    report = Silent()
    assert load(tmp_path, report)["step"] == 1
    assert "step-00000002.pt does not belong to this run" in report.lines[0]
    assert problem in report.lines[0]


def test_checkpoints_of_older_versions_name_no_run(tmp_path):
    torch.save({"x": torch.ones(4), "step": 7}, tmp_path / "step-00000007.pt")
    assert load(tmp_path)["step"] == 7


def test_where_none_fits_nothing_starts_again_unasked(tmp_path):
    save(tmp_path, 1, run="0" * 64)
    save(tmp_path, 2).write_bytes(b"cut off")
    report = Silent()
    with pytest.raises(DamageError, match="none of the 2 checkpoints") as caught:
        load(tmp_path, report)
    assert len(report.lines) == 2
    assert "step 0" in caught.value.fix


def test_no_checkpoint_at_all(tmp_path):
    assert load(tmp_path / "nowhere") is None


def test_weights_and_moments_come_back_to_the_bit(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return model, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def train(model, optimizer, steps):
        for number in range(steps):
            optimizer.zero_grad()
            model(torch.arange(6.0).view(2, 3) + number).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 2)
    save_checkpoint(tmp_path, 2, training_state(model, optimizer), run=RUN, keep=1)
    other, restored = build()
    like = {"model": other.state_dict(), "optimizer": {"state": {}, "param_groups": []}}
    restore_training(other, restored, load_checkpoint(tmp_path, Silent(), run=RUN, like=like))
    for one in ((model, optimizer), (other, restored)):
        train(*one, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["exp_avg_sq"], restored.state[two]["exp_avg_sq"])
