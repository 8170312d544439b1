"""One store: the latents of one view of one shard, as a Zarr v3 group, and the tar that its pixels come from.

It has a group for each kind of latents (``targets/groups.py``). Arrays of a group, n samples, T tokens, D dimensions, P
patches:

    symbols (2, D, n, T) | tokens (n, T, D)  the codec's main array (and `scales` for int8); symbols of klt as planes of
                                             low and high bytes, in chunks of up to 128 components
    norms        (n, T) float16              token norms before normalisation
    attention    (n, P) uint8                the teacher's class-to-patch attention, largest = 255; ViT teachers only

all of them in chunks of 64 samples. Besides the groups:

    samples      (n, R) uint8                a record for each sample, see ``targets/records.py``

``store_writing.py`` and ``store.py`` go to the files directly; ``zarr.open_group`` reads the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import ArraySpec, Codec
from cae2pipe.targets.planes import HIGH, LOW, SPARE, SPARE_AT, SPARE_BYTES, chunk_components

T = TypeVar("T")

SIDE_LEVEL = 1
"""zstd level of norms and attention: both are small compared with the latents."""


PATCHES = "patches"
"""The group of the tokens of the teacher's last layer: the class token, if there is one, and the patches."""
SYMBOLS = "symbols"


def array_name(group: str, name: str) -> str:
    """The name of an array among those of several groups: ``norms``, or ``summary/norms`` in groups but patches."""
    return name if group == PATCHES else f"{group}/{name}"


def arrays_of(group: str, arrays: Mapping[str, T]) -> dict[str, T]:
    """The arrays of one group, under their own names, among those of several."""
    start = array_name(group, "")
    own = {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
    return {name: array for name, array in own.items() if "/" not in name}


@dataclass(frozen=True)
class StoreLayout:
    """Shape of a group of latents, the same for all stores of a set."""

    tokens: int
    dim: int
    patches: int
    attention: bool
    codec: Codec
    group: str = PATCHES

    def blocked(self) -> dict[str, ArraySpec]:
        """The arrays of the group, as the codec makes them."""
        arrays = dict(self.codec.arrays())
        arrays["norms"] = ArraySpec("<f2", 0, SIDE_LEVEL)
        if self.attention:
            arrays["attention"] = ArraySpec("|u1", 0, SIDE_LEVEL)
        return arrays

    def shape(self, name: str, samples: int) -> tuple[int, ...]:
        """Shape of an array of the group over ``samples`` samples."""
        return {
            SYMBOLS: (self.dim, samples, self.tokens),
            "tokens": (samples, self.tokens, self.dim),
            "scales": (samples, self.tokens),
            "norms": (samples, self.tokens),
            "attention": (samples, self.patches),
        }[name]

    def loaded(self) -> dict[str, LoadedArray]:
        """The arrays of the group as loaders read them: symbols as planes."""
        arrays = {}
        for name, spec in self.blocked().items():
            if name == SYMBOLS:
                arrays[LOW] = LoadedArray("|u1", 1, (self.dim, self.tokens))
                arrays[HIGH] = LoadedArray("|u1", 1, (self.codec.wide, self.tokens))
                arrays[SPARE_AT] = LoadedArray("<i4", 0, (SPARE,))
                arrays[SPARE_BYTES] = LoadedArray("|u1", 0, (SPARE,))
            else:
                arrays[name] = LoadedArray(spec.dtype, 0, self.shape(name, 1)[1:])
        return arrays

    def loaded_latents(self) -> tuple[str, ...]:
        """Names of the loaded arrays that the codec decodes."""
        return tuple(name for name in self.loaded() if name not in ("norms", "attention"))

    def sample_axes(self) -> dict[str, int]:
        """The sample axis of each loaded array."""
        return {name: array.sample_axis for name, array in self.loaded().items()}

    def stored(self, name: str) -> StoredArray:
        """How an array of the group lies in its file."""
        return self._stored[name]

    @functools.cached_property
    def _stored(self) -> dict[str, StoredArray]:
        return {name: self._stored_array(name, spec) for name, spec in self.blocked().items()}

    def _stored_array(self, name: str, spec: ArraySpec) -> StoredArray:
        if name == SYMBOLS:
            part = chunk_components(self.dim)
            return StoredArray("|u1", 2, (2, self.dim, self.tokens), (1, part, self.tokens), spec=spec)
        rest = self.shape(name, 1)[1:]
        return StoredArray(spec.dtype, 0, rest, rest, spec=spec)

    def path(self, zarr: str, name: str) -> str:
        """The folder of an array in the store at ``zarr``."""
        return f"{zarr}/{self.group}/{name}"

    def latent_bytes(self, zarr: str, files: Mapping[str, Mapping[str, Any]]) -> int:
        """Bytes of the latents (the codec's arrays and the norms) among the files of the store at ``zarr``."""
        arrays = tuple(f"{self.path(zarr, name)}/" for name in (*self.codec.arrays(), "norms"))
        return sum(entry["bytes"] for path, entry in files.items() if path.startswith(arrays))


def loaded_arrays(layouts: Iterable[StoreLayout]) -> dict[str, LoadedArray]:
    """The arrays of several groups as loaders read them, by ``array_name``."""
    return {array_name(own.group, name): array for own in layouts for name, array in own.loaded().items()}


@dataclass(frozen=True)
class LoadedArray:
    """An array as loaders read it. ``rest``: its shape without the axis of samples."""

    dtype: str
    sample_axis: int
    rest: tuple[int, ...]

    def shape(self, samples: int) -> tuple[int, ...]:
        return with_samples(self.rest, self.sample_axis, samples)


@dataclass(frozen=True)
class StoredArray:
    """An array as it lies in its shard file. ``rest`` and ``part``: the shapes of the array and of a chunk without the
    axis of samples, of which a chunk has 64."""

    dtype: str
    sample_axis: int
    rest: tuple[int, ...]
    part: tuple[int, ...]
    spec: ArraySpec

    def shape(self, samples: int) -> tuple[int, ...]:
        return with_samples(self.rest, self.sample_axis, samples)

    @functools.cached_property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return with_samples(self.part, self.sample_axis, BLOCK)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize

    @functools.cached_property
    def grid(self) -> tuple[int | None, ...]:
        """The number of chunks along each axis; None along that of samples."""
        sides = [-(-whole // part) for whole, part in zip(self.rest, self.part, strict=True)]
        return (*sides[: self.sample_axis], None, *sides[self.sample_axis :])

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return math.prod(side for side in self.grid if side is not None)

    def shard(self, samples: int) -> tuple[int, ...]:
        """Shape of the Zarr shard that holds all chunks."""
        sides = zip(self.chunk, self.grid, strict=True)
        return tuple(-(-samples // BLOCK) * BLOCK if count is None else side * count for side, count in sides)

    @property
    def data_path(self) -> str:
        """The shard file, below the array's folder."""
        return "/".join(["c", *["0"] * (len(self.rest) + 1)])


def with_samples(rest: tuple[int, ...], axis: int, samples: int) -> tuple[int, ...]:
    """A shape with the axis of samples inserted."""
    return (*rest[:axis], samples, *rest[axis:])
