"""Weights from files, without ever running code that is in them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.hub import local_dir


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file with only tensors and ``inert_types``.

    Raises:
        TeacherError: missing, damaged, a TorchScript archive, or a pickle that needs to run code.
    """
    check_present(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            reraise_exhaustion(error)
            raise TeacherError(f"this is not a complete safetensors file: {error}", where=path, fix=_REPLACE) from None
    if _is_torchscript(path):
        raise TeacherError(
            "this is a TorchScript archive, which contains code; cae2pipe only loads weights",
            where=path,
            fix="use the safetensors file of these weights from the hub, e.g. `cae2pipe teachers fetch clip-b16`",
        )
    try:
        with torch.serialization.safe_globals(inert_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        raise TeacherError(
            f"this file holds more than tensors{f' ({named[1]})' if named else ''}, and loading it could run code",
            where=path,
            fix=f'{_REPLACE}; if you trust its author, convert it: `python -c "import sys, torch; '
            "from safetensors.torch import save_file; state = torch.load(sys.argv[1], 'cpu', weights_only=False); "
            "save_file(state.get('model', state), sys.argv[2])\" FILE weights.safetensors`",
        ) from None
    except Exception as error:  # torch.load raises many types for a file that is truncated or of another format
        reraise_exhaustion(error)
        raise TeacherError(f"this weights file cannot be read: {error}", where=path, fix=_REPLACE) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise TeacherError("this file does not hold tensors by name", where=path, fix=_REPLACE)
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


_REPLACE = "give a safetensors file of the weights"


def inert_types() -> list[Any]:
    """Harmless types that training scripts store with the weights: argparse's namespace of their arguments, and numpy's
    numbers, which schedules leave in an optimizer's groups. numpy 2 has moved its numbers' constructor."""
    import numpy as np
    from numpy._core.multiarray import scalar

    numbers = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    constructor = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *numbers, *constructor]


def check_present(path: Path) -> None:
    """Raise TeacherError if there is no weights file."""
    if path.is_dir():
        raise TeacherError(
            "this is a folder, not a weights file",
            where=path,
            fix=f"give a file in it, or --teacher {local_dir(path)} if it has timm's config.json",
        )
    if not path.is_file():
        raise TeacherError("no such weights file", where=path, fix="check teacher.weights")


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The free metadata of a safetensors file; {} for other files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load weights. Every name and shape must match.

    Raises:
        TeacherError: some are missing, unexpected, or of another shape.
    """
    check_fit(module, state, where)
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Raise TeacherError unless names and shapes are exactly a module's."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unknown or wrong:
        parts = [
            f"{len(names)} {what} (first: {names[0]}{_shapes(own, state, names[0])})"
            for what, names in (("missing", missing), ("unexpected", unknown), ("of another shape", wrong))
            if names
        ]
        raise TeacherError(
            f"the weights do not fit the model: {', '.join(parts)}",
            where=where,
            fix="check that teacher.name (or teacher.vision_cfg) is the model of these weights",
        )


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):  # does not affect results, and some files omit it
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _shapes(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> str:
    if name in own and name in state:
        return f", {tuple(state[name].shape)} for {tuple(own[name].shape)}"
    return ""
