"""Arithmetic operations of a step, counted from the model, and the peak rate of a device."""

from __future__ import annotations

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.methods.registry import build_method

PEAKS = {
    "GB200": 2500.0,
    "GB300": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Peak rate of dense bfloat16 with float32 accumulation, in 10^12 operations per second, from the vendors' data sheets.
A device's name must contain the key as whole words; the first match counts."""

OTHERS = {"Laptop", "Max-Q", "MIG", "D", "Ti", "SUPER"}
"""Words that mark another device of a similar name, or a part of one."""


def forward_flops(settings: PretrainSettings, target_dim: int) -> int:
    """Operations (two per multiply-add) of one image's forward pass through encoder, regressor and head."""
    model = settings.model
    visible = model.grid**2 - settings.masked_patches
    with torch.device("meta"):
        student = build_method(settings.method, model, target_dim).requires_grad_(False)
        pixels = torch.empty(1, 3, model.image_size, model.image_size)
        indices = (torch.empty(1, count, dtype=torch.int64) for count in (visible, settings.masked_patches))
        counter = FlopCounterMode(display=False)
        with counter:
            student(pixels, *indices)
    return int(counter.get_total_flops())


def training_flops(settings: PretrainSettings, target_dim: int) -> int:
    """Operations of one image's forward and backward pass, by convention three times those of the forward pass."""
    return 3 * forward_flops(settings, target_dim)


def peak_tflops(device: torch.device, setting: float | None) -> float | None:
    """The setting, or the known bfloat16 peak of the device; None if unknown."""
    if setting is not None or device.type != "cuda":
        return setting
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """A device's peak by its driver's name, such as "NVIDIA H100 80GB HBM3"."""
    for known, peak in PEAKS.items():
        if match := re.search(rf"\b{re.escape(known)}\b", name):
            rest = name[match.end() :]
            # The name of a share of a card, such as "GRID A100-10C", ends in a profile.
            return None if OTHERS & set(rest.split()) or re.match(r"-\d+[ABCQ]\b", rest) else peak
    return None
