"""Calibration of the ``klt`` codec: mean, principal axes, and the step that reaches the asked fidelity.

Made once, in float64 on the CPU with one thread, because ``eigh`` differs in its last bits between thread counts; then
written as part of the set and never computed again, so that resumed, grown and repaired sets agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cae2pipe.targets.chunks import BLOCK, SHUFFLES, Shuffle, encode_chunk
from cae2pipe.targets.codecs import Codec, Fp16Codec, Int8Codec, KltCodec, as_tensors

MARGIN = 0.96
"""The step is chosen for this share of the allowed cosine distance: other images differ from the held-out ones."""


@dataclass(frozen=True)
class Calibration:
    """What coding needs: ``mean`` (D,), and for klt ``basis`` (D, D) and ``step``, float32, and Blosc's ``shuffle``."""

    mean: Tensor
    basis: Tensor | None = None
    step: float | None = None
    shuffle: Shuffle = "shuffle"


@dataclass(frozen=True)
class Fidelity:
    """Cosines between stored and true tokens: mean and 1st percentile, raw and centred (the set's mean removed)."""

    mean: float
    p1: float
    centred_mean: float
    centred_p1: float


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def token_cosines(true: Tensor, decoded: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Raw and centred cosine of every token. (n, T, D) twice and (D,) to (n * T,) twice, float32."""
    mean = mean.to(true.device)
    return _cosines(true, decoded), _cosines(true - mean, decoded - mean)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    dot = torch.linalg.vecdot(a, b)
    return (
        dot / (torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)).clamp_min(1e-12)
    ).flatten()


def summarise(raw: Tensor, centred: Tensor) -> Fidelity:
    def mean_and_p1(values: Tensor) -> tuple[float, float]:
        # Rounded so that the figures in manifests do not hang on the order of a sum.
        ordered = values.double().sort().values
        return round(float(ordered.mean()), 7), round(float(ordered[(len(ordered) - 1) // 100]), 7)

    return Fidelity(*mean_and_p1(raw), *mean_and_p1(centred))


def calibrate(unit: Tensor, codec: str, fidelity: float, level: int) -> tuple[Calibration, Fidelity]:
    """Fit on three quarters of the samples, choose the step on the held-out quarter.

    Args:
        unit: unit tokens (n, T, D) float32 on the CPU.
        codec: ``klt``, ``int8`` or ``fp16``; the last two only need the mean.
        fidelity: mean cosine to reach on held-out samples.
        level: zstd level, passed on.

    Returns:
        The calibration, and the fidelity it reaches on the held-out samples.
    """
    with one_thread():
        held = max(1, len(unit) // 4)
        fit, test = (unit[:-held], unit[-held:]) if len(unit) > 1 else (unit, unit)
        mean, basis = principal_axes(fit)
        calibration = Calibration(mean.float())
        if codec == "klt":
            step = find_step(test, mean, basis, fidelity)
            calibration = find_shuffle(Calibration(mean.float(), basis.float(), step), test[:BLOCK], level)
        chosen = make_codec(codec, calibration, level)
        decoded = chosen.decode(as_tensors(chosen.encode(test)))
        return calibration, summarise(*token_cosines(test, decoded, calibration.mean))


def principal_axes(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and principal axes (D, D), float64, largest variance first.

    An eigenvector's sign is arbitrary: the component of largest magnitude is made positive.
    """
    flat = unit.reshape(-1, unit.shape[-1]).double()
    mean = flat.mean(dim=0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(flat) - 1))
    basis = vectors.flip(1)
    largest = basis.abs().argmax(dim=0)
    signs = torch.sign(basis.gather(0, largest.unsqueeze(0)))
    return mean, basis * signs


def find_step(test: Tensor, mean: Tensor, basis: Tensor, fidelity: float) -> float:
    """The largest step, to 0.5%, whose mean cosine distance on ``test`` stays within the allowed one."""
    flat = test.reshape(-1, test.shape[-1]).double()
    coefficients = (flat - mean) @ basis
    allowed = (1 - fidelity) * MARGIN

    def distance(step: float) -> float:
        decoded = torch.round(coefficients / step) * step @ basis.T + mean
        return 1 - float(torch.cosine_similarity(flat, decoded, dim=-1).mean())

    # Rounding errors are uniform, variance step^2 / 12 a component: a start that is right for small steps.
    low = high = (24 * allowed / flat.shape[1]) ** 0.5
    while distance(high) <= allowed and high < 4:
        low, high = high, high * 1.3
    while distance(low) > allowed:
        low, high = low / 1.3, low
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if distance(middle) <= allowed else (low, middle)
    # float32, as stored: decoding uses the very number that encoding used.
    return float(torch.tensor(low, dtype=torch.float32))


def find_shuffle(calibration: Calibration, block: Tensor, level: int) -> Calibration:
    """The calibration with whichever shuffle packs a block of unit tokens into fewer bytes.

    With fine steps most symbols fill a byte, which zstd's entropy coder packs best whole; with coarse ones most bits
    are zero, and lie together once bits are shuffled. On a ViT-Ti's tokens bytes take 2.8% less at a fidelity of
    0.999, bits 5% less at 0.99 (benchmarks/codec_pareto.py).
    """
    candidates = [replace(calibration, shuffle=shuffle) for shuffle in SHUFFLES]

    def size(candidate: Calibration) -> int:
        codec = make_codec("klt", candidate, level)
        spec = codec.arrays()[codec.main]
        return len(encode_chunk(codec.encode(block)[codec.main], spec.level, spec.shuffle))

    return min(candidates, key=size)


def make_codec(name: str, calibration: Calibration, level: int = 1) -> Codec:
    """The codec of that name. ``klt`` needs a calibration with basis and step."""
    if name == "fp16":
        return Fp16Codec()
    if name == "int8":
        return Int8Codec()
    assert calibration.basis is not None
    assert calibration.step is not None
    return KltCodec(calibration.mean, calibration.basis, calibration.step, level, calibration.shuffle)
