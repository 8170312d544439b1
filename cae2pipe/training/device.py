"""Which device to use, and how."""

from __future__ import annotations

import os

import torch

from cae2pipe.errors import SettingsError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is a CUDA device, or the CPU where there is none; ranks of one machine take different ones.

    Raises:
        SettingsError: an unknown name, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(
            f"unknown device {name!r}", where="speed.device", fix="use auto, cpu, cuda or cuda:1"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"device {name} is not on this machine ({torch.cuda.device_count()} CUDA devices)",
            where="speed.device",
            fix="use --device auto or --device cpu",
        )
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto``: bf16 autocast on CUDA, fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def set_backends(bf16: bool, deterministic: bool) -> None:
    """Say how matrix products are computed, rather than leave it to torch's defaults.

    Where the student computes in bfloat16, TF32 may compute what is left in float32: the latents' decoding, whose
    integers fit its 11 bits and whose basis it rounds by 5e-4 of each entry (tests/training/test_objective.py has what
    that does to a cosine). Otherwise float32 is meant. Shapes never change, so cuDNN may try its algorithms once.
    """
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
