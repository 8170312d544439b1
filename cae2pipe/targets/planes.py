"""Symbols of the klt codec as bytes: how they are stored, and how they are loaded.

Nearly all symbols fit into a byte. A store therefore holds two planes, the low bytes and the high bytes, each in chunks
of a few components; a chunk of zeros is not stored, and most chunks of high bytes are zeros. Every symbol of 16 bits
has this form: none is clipped, whatever the components did in the calibration.

A loader wants arrays of a fixed shape with few bytes. It takes the low bytes of all components, the high bytes of the
``wide`` first components, which often need them, and the few other high bytes that are not zero one by one.

Shapes: n samples, T tokens, D components (of rank, see ``TokenKltCodec``), W wide ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

COMPONENTS = 128
"""Most components of a chunk. Smaller chunks take longer to decompress, larger ones have more high bytes of zero."""
SPARE = 4
"""Fewest places for single high bytes per sample."""

LOW, HIGH, SPARE_AT, SPARE_BYTES = "low", "high", "spare_at", "spare_bytes"
PLANES = (LOW, HIGH, SPARE_AT, SPARE_BYTES)
"""The loaded form of symbols."""
SPARES = (SPARE_AT, SPARE_BYTES)
"""Arrays (n, E) whose second axis is as long as a sample needs at most."""


def is_spare(name: str) -> bool:
    """Whether an array is one of ``SPARES``, of any group (``summary/spare_at``)."""
    return name.rpartition("/")[2] in SPARES


def chunk_components(dim: int) -> int:
    """Components of a chunk: the fewest with which a plane has no more chunks than with ``COMPONENTS``."""
    return -(-dim // -(-dim // COMPONENTS))


def split_symbols(symbols: np.ndarray) -> np.ndarray:
    """Symbols (D, n, T) uint16 as planes (2, D, n, T) uint8: low bytes, high bytes."""
    return np.stack([symbols & 0xFF, symbols >> 8]).astype(np.uint8)


def merge_symbols(planes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Symbols (D, n, T) uint16 from their loaded form."""
    symbols = planes[LOW].astype("<u2")
    wide = planes[HIGH]
    symbols[: len(wide)] |= wide.astype("<u2") << 8
    sample, place = planes[SPARE_BYTES].nonzero()
    component, token = np.divmod(planes[SPARE_AT][sample, place], symbols.shape[2])
    symbols[component, sample, token] |= planes[SPARE_BYTES][sample, place].astype("<u2") << 8
    return symbols


def spare_arrays(found: list[tuple[int, np.ndarray]], samples: int) -> dict[str, np.ndarray]:
    """The high bytes of components that are not wide, one by one.

    Args:
        found: number of the first component, and high bytes (c, 64, T) of it and those that follow, contiguous.
        samples: n, at most 64.

    Returns:
        ``spare_at`` (n, E) int32, component * T + token of each byte, and ``spare_bytes`` (n, E) uint8, the bytes; E is
        a power of two, and unused places have a byte of 0.
    """
    at, sample, value = [], [], []
    for first, high in found:
        # Of words first: nearly all are zero, and there are 64 samples in any case.
        words = np.flatnonzero(high.reshape(-1).view(np.uint64))
        places = (8 * words[:, None] + np.arange(8)).ravel()
        bytes_there = high.reshape(-1)[places]
        places = places[bytes_there > 0]
        component, row, token = np.unravel_index(places, high.shape)
        at.append((component + first) * high.shape[2] + token)
        sample.append(row)
        value.append(bytes_there[bytes_there > 0])
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *sample])
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    width = max(SPARE, 1 << int(place.max(initial=0)).bit_length())
    places, spare = np.zeros((samples, width), dtype=np.int32), np.zeros((samples, width), dtype=np.uint8)
    if len(rows):
        places[rows, place] = np.concatenate(at)[order]
        spare[rows, place] = np.concatenate(value)[order]
    return {SPARE_AT: places, SPARE_BYTES: spare}


def same_width(spares: Sequence[Tensor]) -> list[Tensor]:
    """Arrays of ``SPARES`` with unused places at the ends of the shorter ones."""
    width = max(array.shape[1] for array in spares)
    return [torch.nn.functional.pad(array, (0, width - array.shape[1])) for array in spares]


def with_symbols(arrays: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The arrays, of any groups, with symbols instead of their planes."""
    for start in [name.removesuffix(LOW) for name in arrays if name.rpartition("/")[2] == LOW]:
        planes = {plane: arrays[start + plane] for plane in PLANES}
        others = {name: array for name, array in arrays.items() if name.removeprefix(start) not in PLANES}
        arrays = {f"{start}symbols": join_planes(planes), **others}
    return arrays


def join_planes(planes: Mapping[str, Tensor]) -> Tensor:
    """The bits of symbols as int16 (D, n, T), from their loaded form on any device."""
    low, wide, at, spare = planes[LOW], planes[HIGH], planes[SPARE_AT], planes[SPARE_BYTES]
    count, tokens = len(wide), low.shape[2]
    head = low[:count].to(torch.int16) | (wide.to(torch.int16) << 8)
    symbols = torch.cat([head, low[count:].to(torch.int16)])
    sample = torch.arange(len(at), device=at.device).unsqueeze(1).expand_as(at)
    index = at.to(torch.int64)
    # A place that is not used adds 0.
    where = (index // tokens, sample, index % tokens)
    return symbols.index_put(where, spare.to(torch.int16) << 8, accumulate=True)
