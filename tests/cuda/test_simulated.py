"""The simulation, on which the other tests of this folder rely: its refusals and its records."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.simulated import on_cpu

CUDA, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize("other", [torch.device("cpu"), OTHER], ids=str)
def test_tensors_of_two_devices_are_refused(other, cuda):
    with cuda, pytest.raises(RuntimeError, match=r"two (different )?devices"):
        torch.ones(2, 3, device=CUDA) @ torch.ones(3, 2, device=other)


def test_what_is_computed_has_values(cuda):
    layer = torch.nn.Linear(3, 2)
    given = torch.rand(4, 3)
    wanted = layer(given)
    with cuda:
        got = layer.to(CUDA)(given.to(CUDA))
        assert got.device == CUDA
        assert torch.equal(on_cpu(got), wanted)
        assert torch.equal(got.cpu(), wanted)
        got.sum().backward()
        assert (layer.weight.grad == 1).all()
    assert cuda.products == {torch.float32: 1}


def test_autocast_is_that_of_cuda(cuda):
    with cuda, torch.autocast("cuda", torch.bfloat16):
        weight = torch.ones(3, 3, device=CUDA)
        assert (weight @ weight).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(weight, (3,)).dtype == torch.float32
    assert cuda.products == {torch.bfloat16: 1}


def test_what_the_host_would_wait_for_is_noted(cuda):
    with cuda:
        tensor = torch.zeros(3, device=CUDA)
        tensor.add_(1).to(torch.float64, non_blocking=True)
        torch.ones(3).to(CUDA, non_blocking=True)
        assert cuda.waits == []
        for wait in (
            tensor.tolist,
            tensor.nonzero,
            tensor.cpu,
            lambda: bool(tensor.any()),
            lambda: torch.ones(3).to(CUDA),
        ):
            wait()
            assert cuda.waits
            cuda.waits.clear()
