"""Files of tensors, written so that a full disk raises an OSError with a path, and with permissions from the umask.

torch and safetensors open paths themselves: they report a full disk as their own RuntimeErrors, and safetensors
creates files that only their owner may read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cae2pipe.artifacts.atomic import replacing, write_bytes


def write_torch(path: Path, state: object) -> None:
    """Tensors and plain values as ``torch.save`` writes them. Raises OSError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # It concerns the archive's end, which torch tries to write after the disk is full.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors, contiguous and on the CPU, as safetensors. Raises OSError."""
    from safetensors.torch import save

    write_bytes(path, save(tensors, metadata))
