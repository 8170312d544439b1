"""Differences of two variants' accuracies, on the same test images and with the same seeds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

CONFIDENCE = 0.95


def packed(right: NDArray[np.bool_]) -> str:
    """Which images are classified correctly, bool (N,), as N and hexadecimal digits, each of four images."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpacked(text: str) -> NDArray[np.bool_]:
    """Inverse of ``packed``."""
    count, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(count)).astype(bool)


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """The second variant's accuracy minus the first's, and half of that difference's 95 % confidence interval, both in
    points.

    Images and seeds are both samples, of images and of runs. With d the difference of an image and a seed, the squared
    standard error is the sum of two: over N images of the variance of d's mean over seeds, divided by N, and over S
    seeds of the variance of its mean over images, divided by S. That counts the interaction of both twice, so that it
    is not too small on average. The interval is Student's, with Satterthwaite's approximate degrees of freedom: two
    standard errors if images dominate, and more if few seeds do. One seed says nothing about runs: NaN.

    Args:
        first, second: bool (S, N).
    """
    each = 100.0 * (second.astype(float) - first.astype(float))
    if len(each) < 2:
        return float(each.mean()), math.nan
    averages = (each.mean(axis=0), each.mean(axis=1))
    parts = [(float(np.var(means, ddof=1)) / len(means), len(means) - 1) for means in averages]
    squared = sum(variance for variance, _ in parts)
    if not squared:
        return float(each.mean()), 0.0
    freedom = squared**2 / sum(variance**2 / degrees for variance, degrees in parts)
    return float(each.mean()), float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(squared)


def verdict(points: float, margin: float, paper: float) -> str:
    """Whether a difference has the sign of the paper's, if it is larger than ``margin``."""
    if not abs(points) > margin:  # also if it is NaN
        return "cannot be told"
    return "holds" if points * paper > 0 else "does not hold"
