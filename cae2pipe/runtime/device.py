"""Which device to use, and with which numerics."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.ranks import Rank

ALONE = Rank()


def pick_device(name: str, rank: Rank = ALONE) -> torch.device:
    """``auto`` is a CUDA device, or the CPU where there is none; torchrun's processes on a machine take different ones.

    A CUDA device always has an index, as tensors on it have, and becomes the current one: events, and all code
    that is not given a device, use the current one.

    Raises:
        SettingsError: an unknown name, a device that this machine does not have, or one device for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if not match:
        raise SettingsError(f"unknown device {name!r}", where="speed.device", fix="use auto, cpu, cuda or cuda:1")
    if name == "cpu":
        return torch.device("cpu")
    index = int(match[1]) if match[1] else rank.local
    if match[1] and rank.on_machine > 1:
        raise SettingsError(
            f"device {name} is a single device, but {rank.on_machine} processes run on this machine",
            where="speed.device",
            fix="use --device cuda, and CUDA_VISIBLE_DEVICES to select the processes' devices",
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise SettingsError(
            f"this machine has no device cuda:{index} (CUDA devices: {count})",
            where="speed.device",
            fix=f"start at most {count} processes on this machine, each of which sees all of its devices"
            if count and rank.on_machine > 1
            else "use --device auto or --device cpu",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto``: bf16 autocast on CUDA devices that support it (Ampere or newer); fp32 elsewhere."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    return precision


def set_backends(bf16: bool = False, deterministic: bool = False, fixed_shapes: bool = False) -> None:
    """Set how float32 is computed, instead of relying on torch's defaults or on what ran before in this process.

    Every stage calls this first. Where a network is trained in bfloat16, TF32 may be used for the rest of float32: the
    latents' decoding, whose integers fit its 11 bits and whose basis is rounded by 5e-4 of each entry
    (tests/training/test_objective.py measures the effect on a cosine). Otherwise float32 stays exact. Where shapes
    never change, cuDNN may benchmark its algorithms once; which one is fastest, and therefore the last bits, may differ
    from run to run, so extraction does not use this.
    """
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    torch.backends.cudnn.benchmark = fixed_shapes and not deterministic
    if deterministic:
        # cuBLAS reads this when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Exact float32, without autocast and TF32, for results that decide something: cosines, neighbours, boxes.

    The setting is global to the process, so use this in the main thread.
    """
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
