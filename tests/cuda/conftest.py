from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.cuda.simulated import Machine, SimulatedCuda, fill_gradients, on_cpu


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Eight CUDA devices, as far as torch.cuda says."""
    return Machine().install(monkeypatch)


@pytest.fixture
def cuda(machine, monkeypatch) -> SimulatedCuda:
    """``with cuda:`` there are tensors on them. A backward pass gives gradients of ones."""
    # To normalise by a batch's statistics cuDNN has an operation of its own, which the CPU lacks.
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    monkeypatch.setattr(torch.Tensor, "backward", fill_gradients)
    monkeypatch.setattr(torch.utils, "swap_tensors", unmoved)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, with_values(getattr(torch, name)))
    return SimulatedCuda(machine)


def unmoved(parameter: torch.Tensor, moved: torch.Tensor) -> None:
    """In place of the exchange by which ``Module.to`` would move parameters that are on a device: fake tensors have no
    such thing, and none is needed where they are there already."""
    assert (parameter.device, parameter.dtype) == (moved.device, moved.dtype)


def with_values(function):
    """Reads and writes files of what tensors hold, where torch would make fake ones of it."""

    def called(*args, **options):
        with unset_fake_temporarily():
            return function(*on_cpu(args), **options)

    return called
