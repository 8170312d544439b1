"""What the content of batches depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.config.extract import ViewSettings
from cae2pipe.loading.fresh import FreshViews
from cae2pipe.loading.order import BlockList, steps_per_epoch
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.store_layout import LoadedArray, StoreLayout, loaded_arrays


@dataclass(frozen=True)
class OtherTeacher:
    """Another target set over the same views, of which only latents are read: ``layouts`` of its groups; its arrays are
    named with ``prefix`` in front."""

    prefix: str
    root: Path
    units: Mapping[str, StoreUnit]
    layouts: tuple[StoreLayout, ...]

    def loaded(self) -> dict[str, LoadedArray]:
        """The arrays of all groups that are read."""
        return {self.prefix + name: array for name, array in loaded_arrays(self.layouts).items()}


@dataclass(frozen=True)
class Plan:
    """Everything that the content of batches depends on; the same in every process.

    ``units`` are what readers need of the stores' manifest entries, by name, ``blocks`` the blocks in sorted order.
    ``batch`` counts loaded views; each gets ``repeat`` masks. ``layout`` is that of the patches, ``more`` are those of
    other groups that are read. ``arrays`` names the blocked arrays that go to the device, as ``array_name`` does;
    ``guides`` those that guide the masks and stay in the workers. ``size`` is the side of a batch's pixels,
    ``view_size`` that of the set's views, which are reduced to it. ``replayed``: how views are cut from the images that
    the set keeps; None if it keeps the views. ``fresh``: views are cut from the originals instead.
    ``others``: the sets of further teachers. ``decode``: if False, JPEGs are decoded and views cut on the device.
    ``pixels``: the folder that pixels lie in; None: ``root``.
    """

    root: Path
    units: Mapping[str, StoreUnit]
    blocks: BlockList
    layout: StoreLayout
    size: int
    view_size: int
    seed: int
    epochs: int
    batch: int
    streams: int
    window: int
    last_batch: str
    mask_strategy: str
    grid: int
    masked: int
    repeat: int
    drop_columns: int
    arrays: tuple[str, ...]
    more: tuple[StoreLayout, ...] = ()
    guides: tuple[str, ...] = ()
    decode: bool = True
    replayed: ViewSettings | None = None
    fresh: FreshViews | None = None
    cache: BlockCache | None = None
    others: tuple[OtherTeacher, ...] = ()
    pixels: Path | None = None

    def loaded(self) -> dict[str, LoadedArray]:
        """The arrays of all groups that are read."""
        arrays = loaded_arrays((self.layout, *self.more))
        for other in self.others:
            arrays |= other.loaded()
        return arrays

    def sample_axes(self) -> dict[str, int]:
        """The sample axis of each of them."""
        return {name: array.sample_axis for name, array in self.loaded().items()}

    @property
    def samples(self) -> int:
        """Samples per epoch."""
        return self.blocks.total

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return steps_per_epoch(self.samples, self.batch, self.last_batch)

    @property
    def per_stream(self) -> int:
        return self.batch // self.streams
