"""A: description of the machine, and the attention kernels that torch selects on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.pretrain import shares, wait_for
from cae2pipe.runtime.processes import worker_count

SHAPES = {
    "Base, encoder": (8, 12, 99, 64),
    "Small official, encoder": (8, 12, 148, 32),
    "Large official, regressor": (8, 12, 118, 85),
    "Large, encoder": (8, 16, 79, 64),
    "fine-tuning, with a bias": (8, 12, 197, 64),
}
"""Batch, heads, tokens and features of attention; the mask of the last one is trained."""


def describe(state: State, found: Found) -> None:
    shared = Path("/dev/shm")
    found.facts |= {
        "cores": worker_count(-1),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "shared_memory_gb": round(shutil.disk_usage(shared).total / 1e9, 1) if shared.exists() else None,
        "scratch_free_gb": round(shutil.disk_usage(state.scratch).free / 1e9, 1),
        "gcc": first_line("gcc", "--version"),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }
    if state.on_cuda:
        found.facts |= card(state.place)
    else:
        found.skipped["the card"] = "this is a CPU"
    for name, shape in SHAPES.items():
        found.rows.append({"attention": name, "shape": str(shape), **chosen(shape, name.endswith("bias"), state.place)})


def card(device: torch.device) -> dict[str, Any]:
    """Properties of a CUDA device from torch and nvidia-smi."""
    about = torch.cuda.get_device_properties(device)
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    return {
        "nvidia_smi": first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "capability": list(torch.cuda.get_device_capability(device)),
        "device_memory_gb": round(about.total_memory / 1e9, 1),
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def first_line(*command: str) -> str | None:
    """The first line of a command's output; None if there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter((done.stdout or done.stderr).splitlines()), None)


def chosen(shape: tuple[int, ...], biased: bool, device: torch.device) -> dict[str, Any]:
    """The backend that torch selects for an attention in bfloat16, and the kernels that take most of its time in
    forward and backward passes."""
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias = None
    if biased:
        bias = torch.zeros(1, shape[1], shape[2], shape[2], device=device, dtype=torch.bfloat16, requires_grad=True)
    backend = torch._fused_sdp_choice(q, k, v, attn_mask=bias)
    named = {int(value): name for name, value in SDPBackend.__members__.items()}

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()
        wait_for(device)

    work()
    return {"backend": named.get(int(backend), str(backend)), "kernels": " | ".join(shares(work, device, 3))}
