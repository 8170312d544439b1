from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.cuda.simulated import Machine, SimulatedCuda, fill_gradients, on_cpu


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Eight CUDA devices according to torch.cuda."""
    return Machine().install(monkeypatch)


@pytest.fixture
def cuda(machine, monkeypatch) -> SimulatedCuda:
    """Within ``with cuda:`` tensors can be on them. A backward pass gives gradients of ones."""
    # cuDNN has a special operation for normalising by batch statistics, which the CPU lacks.
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    monkeypatch.setattr(torch.Tensor, "backward", fill_gradients)
    monkeypatch.setattr(torch.utils, "swap_tensors", unmoved)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, with_values(getattr(torch, name)))
    return SimulatedCuda(machine)


def unmoved(parameter: torch.Tensor, moved: torch.Tensor) -> None:
    """Replaces the swap with which ``Module.to`` moves parameters that are on a device: fake tensors do not support it,
    and parameters that are already there do not need it."""
    assert (parameter.device, parameter.dtype) == (moved.device, moved.dtype)


def with_values(function):
    """Reads and writes files with the tensors' values, where torch would use fake tensors."""

    def called(*args, **options):
        with unset_fake_temporarily():
            return function(*on_cpu(args), **options)

    return called
