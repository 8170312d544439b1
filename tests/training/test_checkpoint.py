import pytest
import torch
from torch import nn

from cae2pipe.progress import Silent
from cae2pipe.training.checkpoint import checkpoints, load_checkpoint, restore_training, save_checkpoint, training_state


def test_the_newest_and_those_for_good_are_kept(tmp_path):
    for step in range(1, 11):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, 2, lambda done: done % 4 == 0)
    assert [path.stem for path in checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (4, 8, 9, 10)]


def test_one_changed_byte_is_noticed_and_the_one_before_is_taken(tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, {"x": torch.full((1000,), float(step))}, 2)
    data = bytearray(path.read_bytes())
    place = data.index(torch.tensor([2.0, 2.0]).numpy().tobytes()) + 400
    data[place] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["x"].unique().numel() == 2  # torch says nothing
    report = Silent()
    assert load_checkpoint(tmp_path, report)["x"][0] == 1
    assert any("step-00000002.pt cannot be read" in line for line in report.lines)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_that_was_passed_over_pushes_no_sound_one_out(tmp_path, keep):
    for step in (3, 6):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, 2)
    (tmp_path / "step-00000006.pt").write_bytes(b"cut off")
    save_checkpoint(tmp_path, 5, {"x": torch.tensor(5)}, keep)
    assert [path.stem for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000005"][-keep:]
    report = Silent()
    assert load_checkpoint(tmp_path, report)["x"] == 5
    assert report.lines == []


def test_no_checkpoint_at_all(tmp_path):
    assert load_checkpoint(tmp_path / "nowhere", Silent()) is None


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
    save_checkpoint(tmp_path, 2, training_state(model, optimizer), 1)
    other, restored = build()
    restore_training(other, restored, load_checkpoint(tmp_path, Silent()))
    for one in ((model, optimizer), (other, restored)):
        train(*one, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["exp_avg_sq"], restored.state[two]["exp_avg_sq"])
