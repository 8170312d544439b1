"""A target set: its manifest, codec and stores, opened for reading.

OUT/manifest.json
OUT/codec.zarr                       mean (D,), and for klt basis (D, D) and step (1,)
OUT/views/v00/000123.tar             the pixels of view 0 of shard 000123
OUT/latents/v00/000123.zarr          the latents of the same samples in the same order
OUT/shards/                          the shard set, where extract-targets was given a folder of images
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.box import Box, check_files, open_box
from cae2pipe.artifacts.places import file_sizes, read_bytes
from cae2pipe.errors import DamageError, ManifestError
from cae2pipe.targets.calibration import Calibration, make_codec
from cae2pipe.targets.store import REMEDY, Layout, StoreReader

KIND = "targets"
CODEC = "codec"


def store_name(view: int, shard: str) -> str:
    """The unit's name: ``v00/000123``."""
    return f"v{view:02d}/{shard}"


@dataclass(frozen=True)
class TeacherFacts:
    """What readers must know of the teacher, from the manifest."""

    name: str
    dim: int
    rows: int
    cols: int
    class_token: bool

    @property
    def patches(self) -> int:
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        return self.patches + self.class_token


class TargetSet:
    """An opened target set. ``stores`` maps ``v00/000123`` to its manifest entry.

    Args:
        root: the set's folder.

    Raises:
        ManifestError: not a target set, or one without calibration or stores.
        DamageError: the calibration, or a file of a store, is missing or has another size than the manifest says.
    """

    def __init__(self, root: Path):
        self.root = root
        self.box: Box = open_box(root, KIND)
        self.stores: dict[str, dict[str, Any]] = {name: unit for name, unit in self.box.units.items() if name != CODEC}
        if CODEC not in self.box.units or not self.stores:
            raise ManifestError(
                "this target set holds no finished store yet",
                where=root,
                fix="run `cae2pipe extract-targets` with the same arguments as before",
            )
        for name in sorted(self.box.units.keys() - self.box.whole()):
            for problem in check_files(self.box, [name], digests=False):
                raise DamageError(problem.what, where=problem.where, fix=REMEDY.format(root=root))
        self.teacher = TeacherFacts(**{name: self.box.facts["teacher"][name] for name in TeacherFacts.__annotations__})
        self.view_size: int = self.box.identity["settings"]["view"]["size"]
        self.classes: list[str] = self.box.facts["classes"]
        codec = self.box.identity["settings"]["codec"]
        self.calibration = read_calibration(root / "codec.zarr")
        self.layout = make_layout(self.box.facts["teacher"], codec, self.calibration)

    @property
    def mean(self) -> Tensor:
        """The mean unit token (D,) float32, which centred cosines are taken about."""
        return self.calibration.mean

    @property
    def views(self) -> int:
        """Views of the best-covered shard."""
        return max(unit["view"] for unit in self.stores.values()) + 1

    @property
    def images(self) -> int:
        """Distinct images, over all shards."""
        return sum({unit["shard"]: unit["samples"] for unit in self.stores.values()}.values())

    def reader(self, name: str) -> StoreReader:
        return StoreReader(self.root, self.stores[name], self.layout)

    def fidelity(self) -> dict[str, float]:
        """Fidelity of the stored views: means over stores, weighted by samples."""
        weights = np.array([unit["samples"] for unit in self.stores.values()], dtype=float)
        names = next(iter(self.stores.values()))["fidelity"]
        return {
            name: round(
                float(np.average([unit["fidelity"][name] for unit in self.stores.values()], weights=weights)), 7
            )
            for name in names
        }

    def bytes_per_view(self) -> dict[str, float]:
        """Mean bytes a view: ``latents`` (codec's arrays and norms), ``pixels`` (JPEGs), ``fp16`` (latents uncoded)."""
        samples = sum(unit["samples"] for unit in self.stores.values())
        mean = {
            name: sum(unit["bytes"][name] for unit in self.stores.values()) / samples for name in ("latents", "pixels")
        }
        return {**mean, "fp16": float(2 * self.teacher.tokens * (self.teacher.dim + 1))}


def make_layout(teacher: dict[str, Any], codec: dict[str, Any], calibration: Calibration) -> Layout:
    """The stores' layout, from the manifest's teacher and codec entries."""
    patches = teacher["rows"] * teacher["cols"]
    return Layout(
        tokens=patches + teacher["class_token"],
        dim=teacher["dim"],
        patches=patches,
        attention=teacher["attention"],
        codec=make_codec(codec["name"], calibration, codec["level"]),
    )


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the local folder ``codec.zarr``."""
    import zarr
    from zarr.codecs import Crc32cCodec

    group = zarr.create_group(path, zarr_format=3, overwrite=True)
    arrays = {"mean": calibration.mean.numpy()}
    if calibration.basis is not None and calibration.step is not None:
        arrays |= {"basis": calibration.basis.numpy(), "step": np.array([calibration.step], dtype="<f4")}
    for name, data in arrays.items():
        array = group.create_array(
            name,
            shape=data.shape,
            chunks=data.shape,
            dtype="<f4",
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array[...] = data


def read_calibration(path: Path) -> Calibration:
    """Read ``codec.zarr``. Raises DamageError where it cannot be read."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype

    try:
        # Small: read whole, so that every place is reached in the same way.
        files = {name: read_bytes(path / name) for name in file_sizes(path)}
        store = zarr.storage.MemoryStore(
            {name: default_buffer_prototype().buffer.from_bytes(d) for name, d in files.items()}
        )
        group = zarr.open_group(store, mode="r")
        arrays = {name: np.asarray(array[...]) for name, array in group.arrays()}
        mean = torch.from_numpy(arrays["mean"])
        if "basis" not in arrays:
            return Calibration(mean)
        return Calibration(mean, torch.from_numpy(arrays["basis"]), float(arrays["step"][0]))
    except (OSError, ValueError, KeyError) as error:
        raise DamageError(
            f"the set's calibration cannot be read ({error}): without it no latent can be decoded",
            where=path,
            fix="restore this folder from a copy, or make the target set again",
        ) from None
