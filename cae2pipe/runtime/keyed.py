"""Random draws that depend only on named keys.

What target sets and the order of samples depend on is drawn here: by a counter-based generator (Philox 4x64) whose
128-bit key is a hash of the draw's purpose, such as ("view", seed, sample key, view). Only raw generator words are
used, not the methods of numpy's Generator, whose streams may change between numpy versions. Code of torch and PIL that
draws by itself, as augmentation in evaluations does, runs in ``seeded.seeded``.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _hash(parts: tuple[str | int, ...]) -> bytes:
    # Type marks and the separator distinguish ("a", 1) from ("a1",).
    text = "\x1f".join(f"i{part}" if isinstance(part, int) else f"s{part}" for part in parts)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def keyed_words(count: int, *parts: str | int) -> np.ndarray:
    """``count`` raw 64-bit words, uint64 (count,)."""
    key = np.frombuffer(_hash(parts), dtype="<u8")
    return np.random.Philox(key=key).random_raw(count)


def keyed_uniforms(count: int, *parts: str | int) -> np.ndarray:
    """``count`` floats uniform in [0, 1), float64 (count,), with 53 random bits each."""
    return (keyed_words(count, *parts) >> np.uint64(11)) * 2.0**-53


def keyed_permutation(count: int, *parts: str | int) -> np.ndarray:
    """A permutation of range(count), int64 (count,)."""
    return np.argsort(keyed_words(count, *parts), kind="stable")


def keyed_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) for generators that take one, such as torch's."""
    return int.from_bytes(_hash(parts)[:8], "little") >> 1
