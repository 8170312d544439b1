"""Conditions of byte identity: the library versions and the kind of processor that a set was made with."""

from __future__ import annotations

from typing import TypedDict

import torch

from cae2pipe.artifacts.manifest_targets import TargetsFacts
from cae2pipe.runtime.progress import Report


class Provenance(TypedDict):
    versions: dict[str, str]
    processor: str


def provenance(device: torch.device) -> Provenance:
    """The manifest's facts ``versions`` and ``processor``, for work on this device."""
    return {"versions": library_versions(), "processor": processor(device)}


def tell_changes(facts: TargetsFacts, device: torch.device, report: Report) -> None:
    """Log if a run is resumed with other libraries or on another processor than the set was started with."""
    now = {**library_versions(), "processor": processor(device)}
    then = {**facts.get("versions", {}), "processor": facts.get("processor", now["processor"])}
    changed = [name for name in sorted(then) if now.get(name, then[name]) != then[name]]
    changes = [f"{name} {then[name]} -> {now[name]}" for name in changed]
    if changes:
        report.log(f"since this set was started: {', '.join(changes)}; values match up to rounding, bytes may differ")


def library_versions() -> dict[str, str]:
    """Versions that byte identity is promised for."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "pillow", "numcodecs", "zarr", "timm", "open_clip_torch")}


def processor(device: torch.device) -> str:
    """The kind of processor that byte identity is promised for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
