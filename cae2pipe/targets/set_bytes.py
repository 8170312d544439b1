"""Bytes of a target set by purpose, from the manifest alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cae2pipe.targets.store_layout import PATCHES, array_name
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class SetBytes:
    """Bytes of the files of a set with ``views`` stored views.

    ``arrays``: of the stores, by array with its metadata; ``metadata``: of whole stores. ``pixels``: of the tars.
    ``other``: of the calibration and the indices of kept images. ``latents``: the part of ``arrays`` that holds latents
    (the codec's arrays and the norms); ``fp16`` and ``int8``: the size of the same latents with these codecs, computed
    from the shapes.
    """

    views: int
    arrays: dict[str, int]
    pixels: int
    other: int
    latents: int
    fp16: int
    int8: int

    @property
    def total(self) -> int:
        return sum(self.arrays.values()) + self.pixels + self.other


def set_bytes(targets: TargetSet) -> SetBytes:
    """The bytes of a set's files, including damaged units."""
    arrays: Counter[str] = Counter()
    pixels = other = 0
    groups = targets.artifact.facts["groups"]
    for unit in targets.artifact.units.values():
        for path, entry in unit["files"].items():
            if "zarr" in unit and path.startswith(f"{unit['zarr']}/"):
                arrays[_array(path.removeprefix(f"{unit['zarr']}/"), groups)] += entry["bytes"]
            elif "tar" in unit and path == unit["tar"]:
                pixels += entry["bytes"]
            else:
                other += entry["bytes"]
    views = sum(unit["samples"] for unit in targets.artifact.units.values() if "view" in unit)
    layouts = [group.layout for group in targets.groups.values()]
    latents = [array_name(own.group, name) for own in layouts for name in (*own.codec.arrays(), "norms")]
    return SetBytes(
        views=views,
        arrays=dict(sorted(arrays.items(), key=lambda item: (-item[1], item[0]))),
        pixels=pixels,
        other=other,
        latents=sum(arrays[name] for name in latents),
        # Norms are fp16 with all codecs; int8 has a 2-byte scale per token.
        fp16=views * sum(2 * own.tokens * (own.dim + 1) for own in layouts),
        int8=views * sum(own.tokens * (own.dim + 4) for own in layouts),
    )


def _array(path: str, groups: Collection[str]) -> str:
    """The array to which a file of a store belongs: ``norms``, or ``layer-03/norms`` of other groups than patches."""
    folder = path.rpartition("/c/")[0] or path.removesuffix("zarr.json").rstrip("/")
    return folder.removeprefix(f"{PATCHES}/") if folder not in ("", *groups) else "metadata"


def array_shape(targets: TargetSet, name: str) -> str:
    """Shape and type of one view's part of a blocked array, named as by ``array_name``, in words; empty for other
    arrays."""
    group, _, name = name.rpartition("/")
    layout = targets.groups[group or PATCHES].layout
    blocked: dict[str, Any] = dict(layout.blocked())
    if name not in blocked:
        return ""
    axis = blocked[name].sample_axis
    shape = [side for index, side in enumerate(layout.shape(name, 1)) if index != axis]
    types = {"<u2": "uint16", "<f2": "float16", "|u1": "uint8", "|i1": "int8"}
    return f"{' × '.join(map(str, shape))} {types[blocked[name].dtype]}"
