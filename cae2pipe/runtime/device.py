"""Which device to use, and how."""

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

    A CUDA device always has an index, as tensors on it have, and is the current one from here on: events, and all that
    is not told a device, mean the current one.

    Raises:
        SettingsError: an unknown name, a device that this machine lacks, or one device for several processes.
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
            f"device {name} names one device for the {rank.on_machine} processes on this machine",
            where="speed.device",
            fix="use --device cuda, and CUDA_VISIBLE_DEVICES to say which devices the processes share",
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise SettingsError(
            f"device cuda:{index} is not on this machine ({count} CUDA devices)",
            where="speed.device",
            fix=f"start at most {count} processes on this machine, each of which sees all of its devices"
            if count and rank.on_machine > 1
            else "use --device auto or --device cpu",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto``: bf16 autocast on CUDA devices that compute it, which begins with Ampere; fp32 elsewhere."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    return precision


def set_backends(bf16: bool = False, deterministic: bool = False, fixed_shapes: bool = False) -> None:
    """Say how float32 is computed, rather than leave it to torch's defaults or to what ran before in this process.

    Every stage calls this first. Where a network is trained in bfloat16, TF32 may compute what is left in float32: the
    latents' decoding, whose integers fit its 11 bits and whose basis it rounds by 5e-4 of each entry
    (tests/training/test_objective.py has what that does to a cosine). Otherwise float32 is meant. Where shapes never
    change, cuDNN may try its algorithms once; which one is fastest, and with it the last bits, may then differ from
    run to run, so extraction does without.
    """
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    torch.backends.cudnn.benchmark = fixed_shapes and not deterministic
    if deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Within it float32 stays float32: neither autocast nor TF32. For what decides: cosines, neighbours, boxes.

    The setting is the process's, so this belongs in its main thread.
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
