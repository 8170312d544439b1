import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cae2pipe.models.truncated_normal import truncated_normal


def expected_std(std: float, cut: float) -> float:
    """Closed form for a symmetrically truncated normal."""
    alpha = cut / std
    density = math.exp(-(alpha**2) / 2) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 2 * alpha * density / math.erf(alpha / math.sqrt(2)))


@given(
    st.floats(1e-3, 10),
    st.floats(0.05, 300),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**32),
)
def test_bounds_mean_and_std(std, cuts, dtype, seed):
    torch.manual_seed(seed)
    tensor = truncated_normal(torch.empty(100, 200, dtype=dtype), std=std, cut=cuts * std)
    assert tensor.abs().max() <= torch.tensor(cuts * std, dtype=dtype)
    wanted = expected_std(std, cuts * std)
    count = tensor.numel()
    # Six standard errors; bfloat16 has eight bits.
    assert abs(tensor.double().mean()) < 6 * wanted / math.sqrt(count)
    assert tensor.double().std() == pytest.approx(wanted, rel=6 / math.sqrt(count) + 1e-3)


def test_quantiles_are_those_of_the_distribution():
    torch.manual_seed(0)
    drawn = truncated_normal(torch.empty(100_000), std=1, cut=1).double()
    found = torch.erf(drawn / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    ordered = (found / 2 + 0.5).sort().values
    # Kolmogorov-Smirnov: exceeded once in 10 ** 7 seeds.
    assert (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max() < 2.9 / math.sqrt(len(drawn))


def test_default_is_the_released_code_s():
    torch.manual_seed(0)
    tensor = truncated_normal(torch.empty(100_000))
    assert tensor.abs().max() <= 0.02
    assert tensor.std() == pytest.approx(0.0108, abs=1e-4)


def test_one_seed_gives_one_draw_in_every_version():
    """Equal to the values of torch 2.11, 2.14 and 2.15 to the bit, and the generator's state afterwards too."""
    torch.manual_seed(0)
    assert torch.equal(
        truncated_normal(torch.empty(5)),
        torch.tensor([0.0183760263, 0.00726957945, -0.001391239, 0.0159376264, 0.00501552457]),
    )
    assert torch.equal(
        truncated_normal(torch.empty(5), std=0.01, cut=2),
        torch.tensor([0.00810410641, -0.00920689944, -0.00382331829, 0.00205325056, -0.0055854572]),
    )
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.empty(10, dtype=torch.float64).uniform_()
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("strided", [False, True])
def test_neither_dtype_nor_layout_nor_default_device_changes_the_draw(strided):
    torch.manual_seed(0)
    wanted = truncated_normal(torch.empty(6, 4, dtype=torch.float64))
    torch.manual_seed(0)
    tensor = torch.empty(4, 6).T if strided else torch.empty(6, 4)
    with torch.device("meta"):
        assert truncated_normal(tensor) is tensor
    assert torch.equal(tensor, wanted.float())


def test_a_meta_tensor_draws_nothing():
    state = torch.get_rng_state()
    assert truncated_normal(torch.empty(3, device="meta")).is_meta
    assert torch.equal(torch.get_rng_state(), state)


def test_a_parameter_is_filled_and_still_trains():
    weight = torch.nn.Parameter(torch.empty(3))
    truncated_normal(weight)
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_a_device_s_tensor_is_drawn_on_the_cpu():
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensor = truncated_normal(torch.empty(3, device="cuda"))
    assert tensor.device.type == "cuda"
