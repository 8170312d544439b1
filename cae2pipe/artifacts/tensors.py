"""Files of tensors, written so that a full disk is an OSError with a path, and the umask decides who may read them.

torch and safetensors open a path by themselves: of a disk that is full they speak in RuntimeErrors of their own, and
safetensors makes files that their owner alone may read.
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
            # It is about the end of the archive, which torch tries to write after the disk has said no.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors, contiguous and on the CPU, as safetensors. Raises OSError."""
    from safetensors.torch import save

    write_bytes(path, save(tensors, metadata))
