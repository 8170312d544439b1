"""The device that a process selects, and process groups on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.device import pick_device, resolve_precision
from cae2pipe.runtime.ranks import Rank
from cae2pipe.runtime.world import init_distributed

ALONE = Rank()


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("local", range(8))
def test_each_process_takes_a_device_of_its_own_and_makes_it_the_current_one(name, local, machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine.current = 3
    device = pick_device(name, Rank(8 + local, 16, local, 8))
    assert device == torch.device("cuda", local)
    assert machine.current == local


def test_a_lone_process_takes_the_device_that_is_named(machine):
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert machine.current == 1
    assert pick_device("cuda") == torch.device("cuda:0")
    assert machine.current == 0
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "rank", "message", "fix"),
    [
        ("cuda:8", ALONE, "no device cuda:8 .CUDA devices: 8", "--device auto"),
        ("cuda:9", ALONE, "no device cuda:9 .CUDA devices: 8", "--device auto"),
        ("cuda", Rank(9, 10, 9, 10), "no device cuda:9", "at most 8 processes"),
        ("cuda:1", Rank(0, 2, 0, 2), "a single device, but 2 processes", "--device cuda"),
        ("cuda:x", ALONE, "unknown device", "cuda:1"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(name, rank, message, fix, machine):
    with pytest.raises(SettingsError, match=message) as refused:
        pick_device(name, rank)
    assert fix in refused.value.fix
    assert machine.current == 0


def test_one_process_on_each_of_several_machines_may_name_its_device(machine):
    assert pick_device("cuda:1", Rank(1, 2, 0, 1)) == torch.device("cuda:1")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_the_default_where_the_device_computes_it(native, machine, monkeypatch):
    """Turing emulates it, which torch reports as supported unless emulation is excluded."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_precision("auto", torch.device("cuda:0")) == ("bf16" if native else "fp32")
    assert resolve_precision("bf16", torch.device("cuda:0")) == "bf16"
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("local", [0, 1])
def test_processes_meet_on_the_devices_that_they_took(name, local, cuda, machine, monkeypatch):
    calls = []
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("parted"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tensor.device))
    with monkeypatch.context() as asked:
        asked.setattr(torch.cuda, "is_available", lambda: True)
        rank = Rank(local, 2, local, 2)
        device = pick_device(name, rank)
    with cuda, init_distributed(rank, device, "ddp") as world:
        assert world.device == device == torch.device("cuda", local)
        assert machine.current == local
    assert calls == ["nccl", device, "parted"]
