import pytest
import torch

from cae2pipe.config.base import load
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.training.flops import forward_flops, peak_tflops, training_flops


@pytest.mark.parametrize(
    ("preset", "dim", "gmacs"), [("tiny", 512, 1.06), ("small", 512, 3.58), ("base", 512, 12.14), ("large", 768, 31.26)]
)
def test_arithmetic_of_the_papers_sizes(preset, dim, gmacs):
    settings = load(PretrainSettings, "pretrain", preset)
    assert forward_flops(settings, dim) / 2e9 == pytest.approx(gmacs, abs=0.015)
    assert training_flops(settings, dim) == 3 * forward_flops(settings, dim)


def test_a_peak_that_is_given_counts_and_a_cpus_is_not_known():
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, None) is None
    assert peak_tflops(cpu, 2.5) == 2.5
