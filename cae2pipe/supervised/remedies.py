"""Advice if a device runs out of memory: valid settings that need less."""

from __future__ import annotations

from pydantic import ValidationError

from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.config.evaluate import AttentiveSettings, FinetuneSettings, LinearSettings

Probed = LinearSettings | AttentiveSettings
Trained = Probed | FinetuneSettings | SegmentSettings | DetectSettings

SMALLER = "use a smaller encoder, or a device with more memory"


def smaller_chunk(settings: Trained, images: int, ranks: int) -> int | None:
    """The largest ``chunk`` that the settings allow, of at most half of ``images``, and that divides evenly among
    ``ranks`` processes; None: there is none."""
    for chunk in range(images // 2, 0, -1):
        # With a probe, processes may have different numbers of chunks.
        if not isinstance(settings, Probed) and settings.batch // chunk % ranks:
            continue
        try:
            type(settings).model_validate(settings.model_dump() | {"chunk": chunk})
        except ValidationError:
            continue
        return chunk
    return None


def chunk_remedy(settings: Trained, images: int, ranks: int, *, begun: bool) -> str:
    """The fix if a training step's chunk of ``images`` does not fit. ``begun``: the output folder has a checkpoint."""
    chunk = smaller_chunk(settings, images, ranks)
    if chunk is None:
        return SMALLER
    return f"--set chunk={chunk}" + (
        ", and use a new output folder, since this one was started with another chunk" * begun
    )


def batch_remedy(images: int) -> str:
    """The fix if a forward pass of ``images`` without gradients does not fit."""
    return f"--set speed.batch={images // 2}" if images > 1 else SMALLER


def cpu_remedy(*kept: str) -> str:
    """The fix if no setting needs less memory: resume on the CPU. ``kept``: settings whose default would differ on a
    CPU, such as ``precision=bf16``."""
    return " ".join(["--device cpu", *(f"--set {setting}" for setting in kept)])
