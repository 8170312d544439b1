"""Latent codecs: unit tokens to integers and back. Pure functions of tensors; no file access.

All codecs encode L2-normalised tokens; the store keeps their norms separately. The transform codec rotates into
principal axes. Most coefficients then span a few steps or are always zero, which zstd's entropy coder compresses well
(benchmarks/codec_pareto.py, benchmarks/codec_low_rate.py).

Shapes: n samples, T tokens, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cae2pipe.errors import TeacherError
from cae2pipe.targets.planes import join_planes


@dataclass(frozen=True)
class ArraySpec:
    """How one array of a store is laid out.

    ``sample_axis`` is the axis that runs over samples. ``level`` is the zstd level, or 0 for plain bytes without Blosc.
    """

    dtype: str
    sample_axis: int
    level: int


class Codec(Protocol):
    """Tokens to arrays and back. ``main`` names the array that holds the tokens; ``wide``: the number of first
    components whose symbols often exceed 255."""

    name: str
    main: str
    wide: int

    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays a store of this codec holds."""

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        """Unit tokens (n, T, D) float32 to the codec's arrays."""

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Arrays, on any device, to tokens (n, T, D) float32 on that device. Inverse of ``encode`` up to its error.
        Symbols may be given as planes, as loaders read them (``targets/planes.py``)."""

    def place(self, device: torch.device) -> None:
        """Copy the constants of ``decode`` to a device. Otherwise the first call of ``decode`` there does it."""


class Fp16Codec:
    """The reference: unit tokens in half precision."""

    name = "fp16"
    main = "tokens"
    wide = 0

    def arrays(self) -> dict[str, ArraySpec]:
        return {"tokens": ArraySpec("<f2", 0, 0)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        return {"tokens": unit.to(torch.float16).cpu().numpy()}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["tokens"].float()

    def place(self, device: torch.device) -> None:
        pass


class Int8Codec:
    """int8 with one fp16 scale per token. Lossless compression gains nothing here, so bytes are not compressed."""

    name = "int8"
    main = "tokens"
    wide = 0

    def arrays(self) -> dict[str, ArraySpec]:
        return {"tokens": ArraySpec("|i1", 0, 0), "scales": ArraySpec("<f2", 0, 0)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        # The scale is rounded up to its stored value before it is used; otherwise the largest component overflows.
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
    """Transform codec of single tokens: subtract the mean, rotate to principal axes, quantise with one step, zig-zag,
    uint16.

    The codec of sets without ``token_basis``, made before ``TokenKltCodec`` existed.

    Args:
        mean: (D,) float32.
        basis: (D, D) float32, orthonormal columns: the principal axes, largest variance first.
        step: width of a quantisation bin.
        level: zstd level.
    """

    name = "klt"
    main = "symbols"

    def __init__(self, mean: Tensor, basis: Tensor, step: float, *, level: int = 1):
        self.mean = mean
        self.basis = basis
        self.step = step
        self.level = level
        # Nothing is known about the spread of single components.
        self.wide = len(basis)
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}

    def arrays(self) -> dict[str, ArraySpec]:
        return {"symbols": ArraySpec("<u2", 1, self.level)}

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        """Symbols (D, n, T) uint16. Raises TeacherError if a symbol does not fit; it never wraps around."""
        n, tokens, dim = unit.shape
        mean, basis = self._on(unit.device)
        coefficients = (unit.reshape(-1, dim) - mean) @ basis
        symbols = self._symbols(torch.round(coefficients / self.step))
        return {"symbols": _as_stored(symbols.T.reshape(dim, n, tokens))}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Symbols (D, n, T), uint16 or its bits in an int16 tensor, or their planes, to tokens: a scaling and one D x D
        product."""
        symbols = _symbols_in(arrays)
        dim, n, tokens = symbols.shape
        mean, basis = self._on(symbols.device)
        bins = unzigzag(symbols.to(torch.int32) & 0xFFFF).to(torch.float32)
        flat = bins.reshape(dim, n * tokens)
        return torch.addmm(mean, flat.T, basis.T * self.step).reshape(n, tokens, dim)

    def place(self, device: torch.device) -> None:
        self._on(device)

    def _symbols(self, bins: Tensor) -> Tensor:
        """Integers as symbols, int32. Raises TeacherError if one does not fit into uint16."""
        symbols = zigzag(bins.to(torch.int32))
        if symbols.numel() and int(symbols.max()) > 0xFFFF:
            raise TeacherError(
                f"a latent needs symbol {int(symbols.max())}, and the klt codec holds at most 65535",
                where=f"codec step {self.step:.3g}",
                fix="lower --fidelity, or use --codec int8 or fp16",
            )
        return symbols

    def _constants(self) -> tuple[Tensor, ...]:
        """The tensors that coding needs on a device."""
        return self.mean, self.basis

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(constant.to(device) for constant in self._constants())
        return self._placed[device]


class TokenKltCodec(KltCodec):
    """Transform codec of whole images: ``KltCodec``, also rotated along the tokens, with rate-distortion rounding.

    Neighbouring tokens are alike, so a few axes along the tokens hold most of a component's variance. Symbols are
    ordered by the spread of their coefficients, largest first: neighbours have similar distributions, and symbols that
    are nearly always zero come last.

    Args:
        token_basis: (T, T) float32, orthonormal columns: the principal axes along the tokens, largest variance first.
        spread: (T, D) float32: root mean squares of the coefficients over the calibration images.
    """

    def __init__(
        self,
        mean: Tensor,
        basis: Tensor,
        token_basis: Tensor,
        *,
        spread: Tensor,
        step: float,
        level: int = 1,
    ):
        super().__init__(mean, basis, step, level=level)
        self.token_basis = token_basis
        self.spread = spread
        self.wide = wide_components(spread, step)

    def encode(self, unit: Tensor) -> dict[str, np.ndarray]:
        """Symbols (D, n, T) uint16; (i, sample, j) is the symbol of rank i * T + j.

        Raises:
            TeacherError: a symbol does not fit. It never wraps around.
        """
        n, tokens, dim = unit.shape
        mean, basis, token_basis, bias, order, _ = self._on(unit.device)
        coefficients = token_basis.T @ ((unit.reshape(-1, dim) - mean) @ basis).reshape(n, tokens, dim)
        symbols = self._symbols(round_biased(coefficients / self.step, bias))
        ranked = symbols.reshape(n, tokens * dim).index_select(1, order)
        return {"symbols": _as_stored(ranked.reshape(n, dim, tokens).transpose(0, 1))}

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Symbols (D, n, T), uint16 or its bits in an int16 tensor, or their planes, to tokens: a T x T and a D x D
        product."""
        symbols = _symbols_in(arrays).view(torch.int16)
        dim, n, tokens = symbols.shape
        mean, basis, token_basis, _, _, rank = self._on(symbols.device)
        # Gathers rows of samples, still as int16: a third of the time that gathering single float32 values takes.
        bins = unzigzag16(symbols).transpose(1, 2).reshape(dim * tokens, n).index_select(0, rank)
        rows = (token_basis @ bins.to(torch.float32).reshape(tokens, dim * n)).reshape(tokens, dim, n)
        scaled = (basis.T * self.step).expand(tokens, dim, dim)
        return torch.baddbmm(mean, rows.transpose(1, 2), scaled).transpose(0, 1)

    def _constants(self) -> tuple[Tensor, ...]:
        """Adds the rounding biases, and the maps from a coefficient's position in (T, D) to its rank and back."""
        order = torch.argsort(self.spread.flatten(), descending=True, stable=True)
        bias = rounding_bias(self.spread, self.step)
        return self.mean, self.basis, self.token_basis, bias, order, torch.argsort(order)


WIDE = 16
"""A component is wide if its largest root mean square times this needs a symbol above 255."""


def wide_components(spread: Tensor, step: float) -> int:
    """How many of the first components, in order of rank, have symbols that often exceed 255."""
    tokens, dim = spread.shape
    largest = spread.flatten().sort(descending=True).values.reshape(dim, tokens)[:, 0]
    return int((2 * WIDE * largest > 255 * step).sum())


def rounding_bias(spread: Tensor, step: float) -> Tensor:
    """How far, in steps, the boundary between two bins is moved away from zero: 0 to 0.93.

    A bin is worth its bits while it removes more squared error than lambda per bit. lambda = ln 2 / 6 steps^2 is the
    exchange rate of uniform quantisation itself; bits are those of a Laplace distribution of the given spread. The more
    often a coefficient is zero, the more bits another value takes.
    """
    scale = (spread.double() / (step * math.sqrt(2))).clamp_min(1e-3)
    zero = -torch.expm1(-0.5 / scale)
    one = torch.exp(-0.5 / scale) * -torch.expm1(-1 / scale) / 2
    bits = (torch.log2(zero) - torch.log2(one.clamp_min(1e-30))).clamp(0, 16)
    return (bits * (math.log(2) / 12)).to(spread.dtype)


def round_biased(values: Tensor, bias: Tensor) -> Tensor:
    """Rounded to integers, biased towards zero: the boundary between k and k + 1 is at k + 0.5 + bias."""
    return torch.copysign(torch.floor(values.abs() + (0.5 - bias)).clamp_min(0), values)


def _symbols_in(arrays: Mapping[str, Tensor]) -> Tensor:
    return arrays["symbols"] if "symbols" in arrays else join_planes(arrays)


def _as_stored(symbols: Tensor) -> np.ndarray:
    return symbols.contiguous().cpu().numpy().astype("<u2")


def zigzag(values: Tensor) -> Tensor:
    """Signed integers to unsigned ones, small magnitudes first: 0, -1, 1, -2 -> 0, 1, 2, 3. int32 to int32."""
    return (values << 1) ^ (values >> 31)


def unzigzag(symbols: Tensor) -> Tensor:
    """Inverse of ``zigzag``."""
    return (symbols >> 1) ^ -(symbols & 1)


def unzigzag16(symbols: Tensor) -> Tensor:
    """Inverse of ``zigzag`` for 16-bit symbols: their bits as int16, to int16."""
    # In place, since each new tensor of this size costs as much as the arithmetic.
    return (symbols >> 1).bitwise_and_(0x7FFF).bitwise_xor_((symbols & 1).neg_())


def unit_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Raw tokens (n, T, D) to unit tokens (n, T, D) and norms (n, T), float32.

    Raises:
        TeacherError: a norm does not fit into fp16, the type in which norms are stored.
    """
    tokens = tokens.float()
    norms = tokens.norm(dim=-1)
    if norms.numel() and float(norms.max()) > 65504:
        raise TeacherError(
            f"a token has norm {float(norms.max()):.4g}, above the maximum of fp16", fix="check the teacher's weights"
        )
    return tokens / norms.clamp_min(1e-12).unsqueeze(-1), norms


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """numpy arrays as tensors; uint16 becomes int16 of the same bits, which every device can copy. Only arrays in
    read-only memory, which torch does not support, are copied.
    """
    result = {}
    for name, array in arrays.items():
        array = array.view(np.int16) if array.dtype == np.uint16 else array
        result[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    return result
