"""Calibration of the ``klt`` codec: mean, principal axes, spreads, and the step that reaches the requested fidelity.

Made once, in float64 on the CPU with one thread, because ``eigh`` differs in its last bits between thread counts. It is
then written as part of the set and never computed again, so resumed, grown and repaired sets agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cae2pipe.artifacts.manifest_targets import FidelityReached
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import (
    Codec,
    Fp16Codec,
    Int8Codec,
    KltCodec,
    TokenKltCodec,
    as_tensors,
    round_biased,
    rounding_bias,
)

MARGIN = 0.96
"""The step is chosen for this share of the allowed cosine distance: other images differ from the held-out ones."""


@dataclass(frozen=True)
class Calibration:
    """What encoding and decoding need: ``mean`` (D,), and for klt ``basis`` (D, D), ``step``, ``token_basis`` (T, T)
    and ``spread`` (T, D), float32. Sets that older versions began have no ``token_basis`` and ``spread``."""

    mean: Tensor
    basis: Tensor | None = None
    step: float | None = None
    token_basis: Tensor | None = None
    spread: Tensor | None = None


@dataclass(frozen=True)
class Fidelity:
    """Cosines between stored and true tokens: mean and 1st percentile, raw and centred (the set's mean removed)."""

    mean: float
    p1: float
    centred_mean: float
    centred_p1: float

    def entry(self) -> FidelityReached:
        """The manifest's entry."""
        return {
            "mean": self.mean,
            "p1": self.p1,
            "centred_mean": self.centred_mean,
            "centred_p1": self.centred_p1,
        }


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
    dot: Tensor = torch.linalg.vecdot(a, b)
    norms: Tensor = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (dot / norms.clamp_min(1e-12)).flatten()


def summarise(raw: Tensor, centred: Tensor) -> Fidelity:
    def mean_and_p1(values: Tensor) -> tuple[float, float]:
        # Rounded so that the figures in manifests do not depend on the order of a sum.
        ordered = values.double().sort().values
        return round(float(ordered.mean()), 7), round(float(ordered[(len(ordered) - 1) // 100]), 7)

    return Fidelity(*mean_and_p1(raw), *mean_and_p1(centred))


def calibrate(
    unit: Tensor, codec: str, fidelity: float, *, level: int, rotate_tokens: bool = True
) -> tuple[Calibration, Fidelity]:
    """Fit on three quarters of the samples, choose the step on the held-out quarter.

    Args:
        unit: unit tokens (n, T, D) float32 on the CPU.
        codec: ``klt``, ``int8`` or ``fp16``; the last two only need the mean.
        fidelity: mean cosine to reach on held-out samples.
        level: zstd level.
        rotate_tokens: False gives the klt of older versions, to restore the calibration of such a set.

    Returns:
        The calibration, and the fidelity it reaches on the held-out samples.
    """
    with one_thread():
        held = max(1, len(unit) // 4)
        fit, test = (unit[:-held], unit[-held:]) if len(unit) > 1 else (unit, unit)
        mean, basis = principal_axes(fit)
        calibration = Calibration(mean.float())
        if codec == "klt":
            token_basis, spread = token_axes(fit, mean, basis) if rotate_tokens else (None, None)
            step = find_step(test, mean, basis, fidelity=fidelity, token_basis=token_basis, spread=spread)
            calibration = Calibration(mean.float(), basis.float(), step)
            if token_basis is not None and spread is not None:
                calibration = replace(calibration, token_basis=token_basis.float(), spread=spread.float())
        chosen = make_codec(codec, calibration, level)
        decoded = chosen.decode(as_tensors(chosen.encode(test)))
        return calibration, summarise(*token_cosines(test, decoded, calibration.mean))


def principal_axes(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and principal axes (D, D), float64, largest variance first."""
    flat = unit.reshape(-1, unit.shape[-1]).double()
    mean = flat.mean(dim=0)
    centred = flat - mean
    return mean, _axes(centred.T @ centred / max(1, len(flat) - 1))


def token_axes(unit: Tensor, mean: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes along the tokens (T, T), largest variance first, and the root mean square (T, D) of every
    coefficient along both axes; float64."""
    tokens, dim = unit.shape[1:]
    second, squares = torch.zeros(tokens, tokens, dtype=torch.float64), torch.zeros(tokens, dim, dtype=torch.float64)
    blocks = [((block.double() - mean) @ basis) for block in unit.split(BLOCK)]
    for block in blocks:
        rows = block.transpose(0, 1).reshape(tokens, -1)
        second += rows @ rows.T
    token_basis = _axes(second / (len(unit) * dim))
    for block in blocks:
        squares += (token_basis.T @ block).square().sum(dim=0)
    return token_basis, (squares / len(unit)).sqrt()


def _axes(covariance: Tensor) -> Tensor:
    """Eigenvectors in columns, largest eigenvalue first. Their signs are arbitrary: the component of largest magnitude
    is made positive."""
    _, vectors = torch.linalg.eigh(covariance)
    basis: Tensor = vectors.flip(1)
    largest = basis.abs().argmax(dim=0)
    return basis * torch.sign(basis.gather(0, largest.unsqueeze(0)))


def find_step(
    test: Tensor,
    mean: Tensor,
    basis: Tensor,
    *,
    fidelity: float,
    token_basis: Tensor | None = None,
    spread: Tensor | None = None,
) -> float:
    """The largest step, to 0.5%, whose mean cosine distance on ``test`` stays within the allowed one."""
    flat = test.reshape(-1, test.shape[-1]).double()
    coefficients = (flat - mean) @ basis
    if token_basis is not None:
        coefficients = token_basis.T @ coefficients.reshape(test.shape)
    allowed = (1 - fidelity) * MARGIN

    def distance(step: float) -> float:
        if token_basis is None or spread is None:
            bins = torch.round(coefficients / step)
        else:
            bins = (token_basis @ round_biased(coefficients / step, rounding_bias(spread, step))).reshape(flat.shape)
        return 1 - float(torch.cosine_similarity(flat, bins * step @ basis.T + mean, dim=-1).mean())

    # Rounding errors are uniform, with variance step^2 / 12 per component: a good initial value for small steps.
    low = high = (24 * allowed / flat.shape[1]) ** 0.5
    while distance(high) <= allowed and high < 4:
        low, high = high, high * 1.3
    while distance(low) > allowed:
        low, high = low / 1.3, low
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if distance(middle) <= allowed else (low, middle)
    # float32, as stored: decoding uses exactly the number that encoding used.
    return float(torch.tensor(low, dtype=torch.float32))


def make_codec(name: str, calibration: Calibration, level: int = 1) -> Codec:
    """The codec of that name. ``klt`` needs a calibration with basis and step."""
    if name == "fp16":
        return Fp16Codec()
    if name == "int8":
        return Int8Codec()
    assert calibration.basis is not None
    assert calibration.step is not None
    if calibration.token_basis is None or calibration.spread is None:
        return KltCodec(calibration.mean, calibration.basis, calibration.step, level=level)
    return TokenKltCodec(
        calibration.mean,
        calibration.basis,
        calibration.token_basis,
        spread=calibration.spread,
        step=calibration.step,
        level=level,
    )
