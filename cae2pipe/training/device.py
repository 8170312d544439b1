"""Which device to use, and how."""

from __future__ import annotations

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
