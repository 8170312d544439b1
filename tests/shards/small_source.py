"""A small source with many kinds of images, and its settings."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.shard_set import ShardSet

REJECTED = ["cat/cut.jpg", "dog/text.jpg", "elk/empty.png"]
"""Files of ``source`` that cannot be decoded."""


def encoded(kind: str, seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def chosen(workers: int = 0, **settings) -> ShardSettings:
    return ShardSettings(**{"samples": 8, **settings}, speed=ShardSpeed(workers=workers))


def samples(shards: ShardSet) -> dict[str, tuple[int, bytes]]:
    read = [sample for shard in shards.shards for sample in shards.read(shard, 0, shard.samples)]
    assert len({sample.key for sample in read}) == len(read) == shards.images
    return {sample.key: (sample.label, sample.data) for sample in read}


class Stop(Silent):
    """Ends the run with ``error`` after ``after`` images."""

    def __init__(self, after: int, error: BaseException):
        super().__init__()
        self.left, self.error = after, error

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.left -= n
        if self.left < 0:
            raise self.error
