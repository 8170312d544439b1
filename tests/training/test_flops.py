import pytest
import torch

from cae2pipe.config.base import load
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.training.flops import forward_flops, known_peak, peak_tflops, training_flops


@pytest.mark.parametrize(
    ("preset", "dim", "gmacs"), [("tiny", 512, 1.06), ("small", 512, 3.58), ("base", 512, 12.14), ("large", 768, 31.26)]
)
def test_arithmetic_of_the_papers_sizes(preset, dim, gmacs):
    settings = load(PretrainSettings, "pretrain", preset)
    assert forward_flops(settings, dim) / 2e9 == pytest.approx(gmacs, abs=0.015)
    assert training_flops(settings, dim) == 3 * forward_flops(settings, dim)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX 6000 Ada Generation", 364.0),
        ("Quadro RTX 6000", None),
        ("Tesla T4", None),
        ("GRID A100-10C", None),
    ],
)
def test_a_peak_belongs_to_a_whole_name(name, peak):
    assert known_peak(name) == peak


def test_a_peak_that_is_given_counts_and_a_cpus_is_not_known():
    cpu = torch.device("cpu")
    assert peak_tflops(cpu, None) is None
    assert peak_tflops(cpu, 2.5) == 2.5
