"""Latent codecs: unit tokens to integers and back. Pure functions of tensors; no files.

All codecs store L2-normalised tokens; norms are kept apart by the store. Measured on a ViT-S's tokens (384 dimensions):
the transform codec needs 0.37 of int8's bytes at a mean cosine of 0.999 because rotation into principal axes leaves
most components with a range of a few steps, which zstd's entropy coder then packs.

Shapes: n samples, T tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import TeacherError
from cae2pipe.targets.chunks import Shuffle


@dataclass(frozen=True)
class ArraySpec:
    """How one array of a store is laid out.

    ``sample_axis`` is the axis that runs over samples; a chunk holds 64 of them and all of the other axes.
    ``level`` is the zstd level, or 0 for plain bytes without Blosc; ``shuffle`` is Blosc's, of bytes or of bits.
    """

    dtype: str
    sample_axis: int
    level: int
    shuffle: Shuffle = "bitshuffle"


class Codec(Protocol):
    """Tokens to arrays and back. ``main`` names the array that holds the tokens."""

    name: str
    main: str

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays a store of this codec holds."""

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        """Unit tokens (n, T, D) float32 to the codec's arrays."""

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Arrays, on any device, to tokens (n, T, D) float32 on that device. Inverse of ``encode`` up to its error."""

    def place(self, device: torch.device) -> None:
        """Bring what ``decode`` needs to a device, which it otherwise does when it first meets one."""


class Fp16Codec:
    """The reference: unit tokens in half precision."""

    name = "fp16"
    main = "tokens"

    def arrays(self) -> dict[str, ArraySpec]:
        return {"tokens": ArraySpec("<f2", 0, 0)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        return {"tokens": unit.to(torch.float16).cpu().numpy()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["tokens"].float()

    def place(self, device: torch.device) -> None:
        pass


class Int8Codec:
    """One fp16 scale a token. Lossless coding on top gains nothing, so the bytes are stored as they are."""

    name = "int8"
    main = "tokens"

    def arrays(self) -> dict[str, ArraySpec]:
        return {"tokens": ArraySpec("|i1", 0, 0), "scales": ArraySpec("<f2", 0, 0)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        # The scale is rounded to what is stored before it is used, and up: else the largest component overflows.
        scales = unit.abs().amax(dim=-1) / 127
        half = scales.to(torch.float16)
        half = torch.where(half.float() < scales, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
        symbols = torch.round(unit / half.float().clamp_min(1e-12).unsqueeze(-1)).to(torch.int8)
        return {"tokens": symbols.cpu().numpy(), "scales": half.cpu().numpy()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["tokens"].float() * arrays["scales"].float().unsqueeze(-1)

    def place(self, device: torch.device) -> None:
        pass


class KltCodec:
    """Error-bounded transform codec: mean removed, principal axes, one uniform step, zig-zag, uint16.

    Args:
        mean: (D,) float32.
        basis: (D, D) float32, orthonormal columns: the principal axes, largest variance first.
        step: width of a quantisation bin.
        level: zstd level.
        shuffle: Blosc's, of bytes or of bits.
    """

    name = "klt"
    main = "symbols"

    def __init__(self, mean: Tensor, basis: Tensor, step: float, level: int = 1, shuffle: Shuffle = "shuffle"):
        self.mean = mean
        self.basis = basis
        self.step = step
        self.level = level
        self.shuffle: Shuffle = shuffle
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def arrays(self) -> dict[str, ArraySpec]:
        return {"symbols": ArraySpec("<u2", 1, self.level, self.shuffle)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        """Symbols (D, n, T) uint16. Raises TeacherError where a symbol does not fit: it never wraps."""
        n, tokens, dim = unit.shape
        mean, basis = self._on(unit.device)
        coefficients = (unit.reshape(-1, dim) - mean) @ basis
        bins = torch.round(coefficients / self.step).to(torch.int32)
        symbols = zigzag(bins)
        if symbols.numel() and int(symbols.max()) > 0xFFFF:
            raise TeacherError(
                f"a latent needs symbol {int(symbols.max())}, and the klt codec holds at most 65535",
                where=f"codec step {self.step:.3g}",
                fix="lower --fidelity, or use --codec int8 or fp16",
            )
        layout = symbols.T.reshape(dim, n, tokens).contiguous()
        return {"symbols": layout.cpu().numpy().astype("<u2")}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Symbols (D, n, T), uint16 or its bits in an int16 tensor, to tokens: one multiply, one D x D product."""
        symbols = arrays["symbols"]
        dim, n, tokens = symbols.shape
        mean, basis = self._on(symbols.device)
        bins = unzigzag(symbols.to(torch.int32) & 0xFFFF).to(torch.float32)
        flat = bins.reshape(dim, n * tokens)
        return torch.addmm(mean, flat.T, basis.T * self.step).reshape(n, tokens, dim)

    def place(self, device: torch.device) -> None:
        self._on(device)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._placed:
            self._placed[device] = (self.mean.to(device), self.basis.to(device))
        return self._placed[device]


def zigzag(values: Tensor) -> Tensor:
    """Signed integers to unsigned ones, small magnitudes first: 0, -1, 1, -2 -> 0, 1, 2, 3. int32 to int32."""
    return (values << 1) ^ (values >> 31)


def unzigzag(symbols: Tensor) -> Tensor:
    """Inverse of ``zigzag``."""
    return (symbols >> 1) ^ -(symbols & 1)


def unit_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Raw tokens (n, T, D) to unit tokens (n, T, D) and norms (n, T), float32.

    Raises:
        TeacherError: a norm does not fit into fp16, in which norms are stored.
    """
    tokens = tokens.float()
    norms = tokens.norm(dim=-1)
    if norms.numel() and float(norms.max()) > 65504:
        raise TeacherError(
            f"a token has norm {float(norms.max()):.4g}, more than fp16 holds", fix="check the teacher's weights"
        )
    return tokens / norms.clamp_min(1e-12).unsqueeze(-1), norms


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """numpy arrays as tensors; uint16 travels as the bits of int16, which every device can move.

    Nothing is copied but arrays that lie in read-only memory, which torch cannot hold.
    """
    result = {}
    for name, array in arrays.items():
        array = array.view(np.int16) if array.dtype == np.uint16 else array
        result[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    return result
