"""What to change where a device's memory ends: legal settings that this memory depends on."""

from __future__ import annotations

from pydantic import ValidationError

from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.config.evaluate import AttentiveSettings, FinetuneSettings, LinearSettings

Probed = LinearSettings | AttentiveSettings
Trained = Probed | FinetuneSettings | SegmentSettings | DetectSettings

SMALLER = "use a smaller encoder, or a device with more memory"


def smaller_chunk(settings: Trained, images: int, ranks: int) -> int | None:
    """The largest ``chunk`` that the settings allow of at most half of ``images``, and that ``ranks`` processes can
    share out; None: there is none."""
    for chunk in range(images // 2, 0, -1):
        # A probe's chunks need not be the same number for all processes.
        if not isinstance(settings, Probed) and settings.batch // chunk % ranks:
            continue
        try:
            type(settings).model_validate(settings.model_dump() | {"chunk": chunk})
        except ValidationError:
            continue
        return chunk
    return None


def chunk_remedy(settings: Trained, images: int, ranks: int, *, begun: bool) -> str:
    """Where a training step's chunk of ``images`` does not fit. ``begun``: the output folder has a checkpoint."""
    chunk = smaller_chunk(settings, images, ranks)
    if chunk is None:
        return SMALLER
    return f"--set chunk={chunk}" + (", and give another output folder: this one has begun with other chunks" * begun)


def batch_remedy(images: int) -> str:
    """Where ``images`` do not pass the encoder together without gradients."""
    return f"--set speed.batch={images // 2}" if images > 1 else SMALLER


def cpu_remedy(*kept: str) -> str:
    """Where no setting makes it smaller: the CPU takes over what is there already. ``kept``: settings that on a CPU
    would be others by themselves, as ``precision=bf16``."""
    return " ".join(["--device cpu", *(f"--set {setting}" for setting in kept)])
