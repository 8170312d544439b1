"""Settings of k-NN and of the linear probe that are quick."""

from __future__ import annotations

from cae2pipe.config.base import load
from cae2pipe.config.evaluate import KnnSettings, LinearSettings


def knn(*overrides: str) -> KnnSettings:
    return load(
        KnnSettings, "evaluate", "knn", overrides=["speed.workers=0", "speed.device=cpu", "k=[5, 1]", *overrides]
    )


def linear(*overrides: str) -> LinearSettings:
    return load(
        LinearSettings,
        "evaluate",
        "linear",
        overrides=["speed.workers=0", "speed.device=cpu", "cached_crops=1", *overrides],
    )
