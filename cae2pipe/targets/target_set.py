"""A target set: its manifest, codec and stores, opened for reading.

OUT/manifest.json
OUT/codec.zarr/patches               mean (D,), and for klt basis (D, D), step (1,), token_basis (T, T) and
                                     spread (T, D), without the last two in sets of older versions
OUT/codec.zarr/summary, layer-03     the same of other groups of latents, if the set has them
OUT/images/000123.tar                the reduced images of shard 000123, if views are replayed from them
OUT/images/000123.json               index of that tar
OUT/views/v00/000123.tar             otherwise: the pixels of view 0 of shard 000123
OUT/latents/v00/000123.zarr          the latents of the same samples in the same order
OUT/shards/                          the shard set, if extract-targets was given a folder of images
OUT/teachers/LABEL/                  the set of an added teacher over the same views; its pixels are those above
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.artifact import TargetsArtifact, check_files
from cae2pipe.artifacts.manifest import AGAIN
from cae2pipe.artifacts.manifest_targets import FIGURES, SettingsIdentity, StoreUnit
from cae2pipe.artifacts.storage import to_path
from cae2pipe.config.base import build_recorded
from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import DamageError, ManifestError, SettingsError
from cae2pipe.images.kept import view_pixels
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.groups import SUMMARY, layer_of, read_groups
from cae2pipe.targets.paths import CODEC, images_name, of_store
from cae2pipe.targets.shared_pixels import find_pixels, no_pixels
from cae2pipe.targets.store import StoredBlock, StoreReader, rebuild_fix
from cae2pipe.targets.store_layout import PATCHES, arrays_of
from cae2pipe.targets.stores import Stores
from cae2pipe.teachers.labels import label


def recorded_view(settings: SettingsIdentity) -> ViewSettings:
    """How views are drawn and kept, from the settings in a set's manifest.

    Raises:
        ManifestError: the settings are not valid.
    """
    try:
        return build_recorded(ViewSettings, settings["view"], where="view")
    except SettingsError as error:
        raise ManifestError(
            f"a field is not as cae2pipe writes it: identity.settings.view.{error.what}",
            where="manifest.json of the target set",
            fix=AGAIN,
        ) from None


@dataclass(frozen=True)
class TeacherFacts:
    """What readers must know about the teacher, from the manifest. ``summary``: its width, None without one."""

    name: str
    dim: int
    rows: int
    cols: int
    class_token: bool
    summary: int | None = None

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.patches + self.class_token


class Target(NamedTuple):
    """One stored view. Arrays are numpy's or torch's, as chosen when the set was opened.

    ``tokens`` (T, D) float32: the teacher's latents as stored, of unit length up to the codec's error; the class token
    first, if the teacher has one. ``norms`` (T,) float32: their original lengths. ``pixels`` (H, W, 3) uint8: the view.
    ``attention`` (P,) uint8: the teacher's class-to-patch attention, largest value 255; None without one.
    ``label`` is an index into the set's ``classes``; -1: none.

    ``summary`` (W,) float32: the teacher's own output for the view, as stored, of unit length up to the codec's error;
    ``summary_norm``: its original length; None without one. ``layers`` and ``layer_norms``: as ``tokens`` and ``norms``
    for other blocks of the teacher, by the block's number.
    """

    key: str
    view: int
    label: int
    tokens: Any
    norms: Any
    pixels: Any
    attention: Any
    summary: Any = None
    summary_norm: float | None = None
    layers: Mapping[int, Any] = {}
    layer_norms: Mapping[int, Any] = {}


class TargetSet(Sequence[Target]):
    """An opened target set: a sequence of its stored views, store by store, shards in order within each view. A view is
    decoded with its block of 64, and the last block is cached: sequential access is cheap, random is not.
    ``stores`` maps ``v00/000123`` to its manifest entry.

    Args:
        root: the set's folder or URL.
        arrays: type of the arrays in items, ``numpy`` or ``torch``.
        damaged: what to do with views of which a file is missing or differs in size from its manifest entry:
            ``refuse`` the set, or ``omit`` them from ``stores``; ``damage`` then lists the problems.
        image_size: side of items' pixels, as a student of this size sees them, at most ``view_size``. None:
            ``view_size``, as the teacher sees them.
        pixels: of a set by reference, the folder or URL that its pixels lie in; without it only latents can be read.
            That of an added teacher is known.

    Raises:
        SettingsError: views have fewer pixels than ``image_size``; or ``pixels`` holds none of the set's pixels.
        ManifestError: not a target set, or one without calibration or stores.
        DamageError: the calibration, or a file of a store, is missing or differs in size from its manifest entry.
    """

    @checked
    def __init__(
        self,
        root: Path | str,
        arrays: Literal["numpy", "torch"] = "numpy",
        *,
        damaged: Literal["refuse", "omit"] = "refuse",
        image_size: int | None = None,
        pixels: Path | str | None = None,
    ):
        self.root = root = to_path(root)
        self.arrays = arrays
        self.artifact, whole = TargetsArtifact.open_whole(root)
        self.stores = stores_of(self.artifact)
        if CODEC not in self.artifact.units or not self.stores:
            raise ManifestError(
                "this target set has no finished store yet",
                where=root,
                fix="run the same command again, `cae2pipe extract-targets` or `cae2pipe copy`",
            )
        self.groups = read_groups(self.artifact)
        self.calibration = self.groups[PATCHES].calibration
        self.damage: list[DamageError] = []
        for name in sorted(self.artifact.units.keys() - whole):
            for problem in check_files(self.artifact, [name], digests=False):
                self.damage.append(DamageError(problem.what, where=problem.where, fix=rebuild_fix(root)))
                if damaged == "refuse" or name == CODEC:
                    raise self.damage[-1]
        self.pixels_folder, elsewhere = find_pixels(self.artifact, None if pixels is None else to_path(pixels))
        self.damage += elsewhere
        if elsewhere and damaged == "refuse":
            raise elsewhere[0]
        if self.damage:
            lost = {problem.where for problem in self.damage}
            self.stores = self.stores.only(
                name for name, unit in self.stores.items() if lost.isdisjoint(map(str, self._paths(unit)))
            )
            if not self.stores:
                raise self.damage[0]
        teacher = self.artifact.facts["teacher"]
        self.teacher = TeacherFacts(
            teacher["name"],
            teacher["dim"],
            teacher["rows"],
            teacher["cols"],
            teacher["class_token"],
            teacher.get("summary"),
        )
        self.view = recorded_view(self.artifact.identity["settings"])
        self.view_size = self.view.size
        self.image_size = reading_size(self, image_size)
        self.classes = self.artifact.facts["classes"]
        self.layout = self.groups[PATCHES].layout
        self._names = sorted(self.stores)
        self._kept: tuple[tuple[str, int], list[Target]] | None = None

    def _paths(self, unit: StoreUnit) -> list[Path]:
        """The files of a store, without those that are in an unknown folder."""
        referred = [self.pixels_folder / path for path in unit.get("pixels", {})] if self.pixels_folder else []
        return [*(self.root / path for path in unit["files"]), *referred]

    @property
    def pixels_root(self) -> Path:
        """The folder that the set's pixels lie in: its own or, of a set by reference, another one.

        Raises:
            SettingsError: it is not known.
        """
        if self.pixels_folder is None:
            raise no_pixels(self.root, self.stores[self._names[0]]["tar"])
        return self.pixels_folder

    def __fspath__(self) -> str:
        return str(self.root)

    def __repr__(self) -> str:
        held = f"{counted(len(self), 'view')} of {counted(self.images, 'image')}"
        tokens = f"{self.teacher.tokens} x {self.teacher.dim} tokens of {self.teacher.name}"
        codec = f"{self.layout.codec.name}, mean cosine {self.fidelity()['mean']:.4f}"
        return f"TargetSet({str(self.root)!r}: {held}, {tokens}, {codec})"

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([self.stores.samples[name] for name in self._names])

    def __len__(self) -> int:
        """Number of stored views."""
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> list[Target]: ...
    def __getitem__(self, index: int | slice) -> Target | list[Target]:
        """A stored view.

        Raises:
            IndexError: there are fewer views. DamageError: its block cannot be read.
        """
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"view {index} of {len(self)}")
        store = int(np.searchsorted(self._ends, position, side="right"))
        name = self._names[store]
        block, within = divmod(position - (int(self._ends[store - 1]) if store else 0), BLOCK)
        if self._kept is None or self._kept[0] != (name, block):
            self._kept = (name, block), self._read(name, block)
        return self._kept[1][within]

    def _read(self, name: str, block: int) -> list[Target]:
        stored = self.reader(name, self.groups).block(block)
        pixels = torch.from_numpy(self.pixels(stored, size=self.image_size))
        columns = {group: self._tokens(stored, group) for group in self.groups}
        attention = torch.from_numpy(stored.arrays["attention"].copy()) if self.layout.attention else None
        layers = {layer: columns[group] for group in columns if (layer := layer_of(group)) is not None}

        def given(values: Tensor) -> Any:
            return values.numpy() if self.arrays == "numpy" else values

        def target(within: int) -> Target:
            tokens, norms = columns[PATCHES]
            summary, length = columns.get(SUMMARY, (None, None))
            return Target(
                key=stored.keys[within],
                view=self.stores[name]["view"],
                label=int(stored.labels[within]),
                tokens=given(tokens[within]),
                norms=given(norms[within]),
                pixels=given(pixels[within]),
                attention=None if attention is None else given(attention[within]),
                summary=None if summary is None else given(summary[within, 0]),
                summary_norm=None if length is None else float(length[within, 0]),
                layers={layer: given(own[within]) for layer, (own, _) in layers.items()},
                layer_norms={layer: given(own[within]) for layer, (_, own) in layers.items()},
            )

        return [target(within) for within in range(len(stored.keys))]

    def _tokens(self, stored: StoredBlock, group: str) -> tuple[Tensor, Tensor]:
        """The tokens (b, T, D) and norms (b, T) of a group in a block."""
        arrays = arrays_of(group, stored.arrays)
        tokens = self.groups[group].layout.codec.decode(as_tensors(arrays))
        return tokens, torch.from_numpy(arrays["norms"].astype(np.float32))

    @functools.cached_property
    def label(self) -> str:
        """Short name of the teacher among several, see ``cae2pipe/teachers/labels.py``."""
        return label(self.artifact.identity)

    @property
    def replayed(self) -> ViewSettings | None:
        """How views are cut from the images that the set keeps; None where it keeps the views themselves."""
        return self.view if self.view.pixels == "replayed" else None

    def pixels(
        self, block: StoredBlock, positions: Sequence[int] | None = None, *, size: int | None = None
    ) -> np.ndarray:
        """The views of a block, or those at some positions in it, uint8 (b, size, size, 3); by default of
        ``view_size``.

        Raises:
            ImageError: an image cannot be decoded, or is not the one its draw was made for.
        """
        return np.stack(
            [
                view_pixels(
                    block.jpegs[position],
                    block.draws[position],
                    self.replayed,
                    size=size or self.view_size,
                    view_size=self.view_size,
                )
                for position in (range(len(block.jpegs)) if positions is None else positions)
            ]
        )

    @property
    def mean(self) -> Tensor:
        """The mean unit token (D,) float32, which is subtracted for centred cosines."""
        return self.calibration.mean

    @property
    def views(self) -> int:
        """Views of the shard that has most."""
        return max(of_store(name).view for name in self.stores) + 1

    @property
    def images(self) -> int:
        """Distinct images, over all shards."""
        return sum({of_store(name).shard: samples for name, samples in self.stores.samples.items()}.values())

    def only(self, names: Iterable[str]) -> TargetSet:
        """The same set with only some of its stores."""
        narrowed = copy.copy(self)
        narrowed.stores = self.stores.only(names)
        narrowed._names = sorted(narrowed.stores)
        narrowed._kept = None
        narrowed.__dict__.pop("_ends", None)
        return narrowed

    def reader(self, name: str, groups: Iterable[str] = ()) -> StoreReader:
        """Reads a store: the patches, and other groups."""
        more = [self.groups[group].layout for group in groups if group != PATCHES]
        return StoreReader(self.root, self.stores[name], self.layout, more=more, pixels=self.pixels_folder)

    def fidelity(self, group: str = PATCHES) -> dict[str, float]:
        """Fidelity of a group of the stored views: means over stores, weighted by samples."""
        weights = np.array(list(self.stores.samples.values()), dtype=float)
        there = [
            unit["fidelity"] if group == PATCHES else unit["groups"][group]["fidelity"] for unit in self.stores.values()
        ]
        return {
            name: round(float(np.average([entry[name] for entry in there], weights=weights)), 7) for name in FIGURES
        }

    def bytes_per_view(self) -> dict[str, float]:
        """Mean bytes per view: ``latents`` (codec's arrays and norms), ``pixels`` (JPEGs; a replayed view counts its
        share of the image; 0 if they lie elsewhere), ``fp16`` (latents without a codec). Latents are those of all
        groups."""
        samples = sum(unit["samples"] for unit in self.stores.values())
        latents = sum(unit["bytes"]["latents"] for unit in self.stores.values())
        pixels = sum(unit["bytes"]["pixels"] for unit in self.artifact.units.values() if "shard" in unit)
        mean = {"latents": latents / samples, "pixels": pixels / samples}
        layouts = [group.layout for group in self.groups.values()]
        return {**mean, "fp16": float(sum(2 * own.tokens * (own.dim + 1) for own in layouts))}

    def group_bytes_per_view(self) -> dict[str, float]:
        """The mean bytes of latents per view by group."""
        samples = sum(unit["samples"] for unit in self.stores.values())
        more = {
            name: sum(unit["groups"][name]["bytes"] for unit in self.stores.values()) / samples
            for name in self.groups
            if name != PATCHES
        }
        return {PATCHES: self.bytes_per_view()["latents"] - sum(more.values()), **more}


def reading_size(targets: TargetSet, image_size: int | None) -> int:
    """Side of the pixels to read from a set's views: ``image_size``, or the views' own. Raises SettingsError if views
    have fewer pixels."""
    if image_size is None or 1 <= image_size <= targets.view_size:
        return image_size or targets.view_size
    raise SettingsError(
        f"image_size={image_size}, and the set's views have {targets.view_size} pixels",
        where=str(targets.root),
        fix=f"use 1 to {targets.view_size}",
    )


def stores_of(artifact: TargetsArtifact) -> Stores:
    """The stores of a set by name.

    Raises:
        ManifestError: the manifest lists a view but not its images.
    """
    replayed = recorded_view(artifact.identity["settings"]).pixels == "replayed"
    stores = Stores.all_of(artifact, replayed=replayed)
    for name in stores if replayed else ():
        if images_name(of_store(name).shard) not in artifact.units:
            raise ManifestError(
                f"the manifest lists view {name}, but not the images that it is cut from",
                where=artifact.root,
                fix="restore manifest.json from a copy, or make the set again",
            )
    return stores
