"""Several real processes, on the CPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.parallel import full_tensor, wrap_model
from cae2pipe.training.telemetry import MACHINE_METRICS
from tests.ranks import launch
from tests.training.rank import train

ROOT = Path(__file__).parents[2]


def torchrun(job: dict) -> int:
    path = Path(job["out"] + ".json")
    path.write_text(json.dumps(job))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "tests.training.rank", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode


def trained(job: dict) -> None:
    done = launch(train, job)
    assert done.codes == [0, 0], done.stderr


def figures(out: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in MACHINE_METRICS}
        for line in read_lines(out / "metrics.jsonl")
    ]


def near(lines: list[dict], others: list[dict]) -> bool:
    return len(lines) == len(others) and all(
        one == pytest.approx(other, rel=1e-4, abs=1e-6) for one, other in zip(lines, others, strict=True)
    )


@pytest.fixture(scope="module")
def job(target_root, pretrain_settings):
    def made(out: Path, over: dict | None = None, **more) -> dict:
        settings = pretrain_settings(**(over or {})).model_dump(mode="json")
        return {"targets": str(target_root), "out": str(out), "settings": settings, **more}

    return made


@pytest.fixture(scope="module")
def launched(job, tmp_path_factory) -> Path:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    trained(job(folder / "ddp", {"speed": {"workers": 1}}))
    trained(job(folder / "fsdp", {"speed": {"parallel": "fsdp", "accumulation": 2}}))
    return folder


@pytest.fixture(scope="module")
def alone(trained_run) -> Path:
    return trained_run()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(launched, alone, name):
    assert near(figures(launched / name), figures(alone))
    assert (launched / name / "encoder.safetensors").is_file()


def test_sharded_weights_export_like_whole_ones(launched, alone):
    from safetensors.torch import load_file

    wanted = load_file(alone / "encoder.safetensors")
    found = load_file(launched / "fsdp" / "encoder.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:
        # AdamW divides by the root of a square: where gradients vanish, rounding decides.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=2e-4)


def test_a_signal_to_one_process_stops_both_after_the_same_step(job, target_root, pretrain_settings, alone, tmp_path):
    out = tmp_path / "run"
    trained(job(out, {"speed": {"accumulation": 4}}, signal=6))
    assert [(tmp_path / f"run-{rank}.end").read_text() for rank in range(2)] == ["Terminated", "Requeued"]
    stopped = len(figures(out))
    assert 7 <= stopped < 10
    assert [path.stem for path in (out / "checkpoints").glob("*.pt")] == [f"step-{stopped:08d}"]
    # One process resumes where two stopped.
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    assert near(figures(out), figures(alone))


def test_killed_and_resumed_two_processes_give_the_same_bytes(launched, job, tmp_path):
    out = tmp_path / "run"
    over = {"speed": {"keep_epochs": 1}}
    assert torchrun(job(out, over, kill=7)) != 0
    assert [path.stem for path in (out / "checkpoints").glob("*.pt")] == ["step-00000005"]
    trained(job(out, over))
    assert figures(out) == figures(launched / "ddp")
    ours, theirs = ((root / "encoder.safetensors").read_bytes() for root in (out, launched / "ddp"))
    assert ours == theirs


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharding_changes_nothing_of_bfloat16(make, pretrain_settings, group_of_one):
    """Norms and LayerScale stay in float32, as autocast leaves them."""
    plain, batches = make(pretrain_settings(precision="bf16", speed={"accumulation": 2}))
    step, _ = make(pretrain_settings(precision="bf16", speed={"accumulation": 2}))
    step.world = replace(step.world, parallel="fsdp")
    step.module = wrap_model(step.objective, step.world)
    step.parameters = list(step.model.parameters())
    step.optimizer = build_optimizer(step.model, pretrain_settings().optimizer)
    for batch in batches[:3]:
        assert step(batch, 1e-3).values() == plain(batch, 1e-3).values()
    for ours, theirs in zip(step.parameters, plain.parameters, strict=True):
        assert torch.equal(full_tensor(ours), theirs)


def test_a_share_that_cannot_be_cut_is_refused(target_root, pretrain_settings, tmp_path):
    with pytest.raises(SettingsError, match=r"speed\.accumulation") as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(speed={"accumulation": 5}), report=Silent())
    assert "speed.accumulation=4" in caught.value.fix
    assert not (tmp_path / "run").exists()
