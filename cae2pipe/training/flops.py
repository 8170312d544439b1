"""Arithmetic of a step, counted from the model, and what a device could do at most."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.methods.registry import build_method

PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
}
"""Dense bfloat16, 10^12 operations a second, from the makers' data sheets, by what the device's name holds."""


def forward_flops(settings: PretrainSettings, target_dim: int) -> int:
    """Operations (two a multiply-add) of one image's forward pass through encoder, regressor and head."""
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
    """Operations of one image's forward and backward pass, by the custom of three times the forward's."""
    return 3 * forward_flops(settings, target_dim)


def peak_tflops(device: torch.device, setting: float | None) -> float | None:
    """The setting, or what is known of the device in bfloat16; None where that is nothing."""
    if setting is not None or device.type != "cuda":
        return setting
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)
