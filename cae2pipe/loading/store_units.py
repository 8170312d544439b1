"""What loader processes must know of a set's stores: 1 MB for 51,000 local ones, whose manifest has 150 MB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from cae2pipe.artifacts.manifest_targets import StoreUnit, listed
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import is_local
from cae2pipe.targets.paths import images_tar_path, of_store, store_path, view_tar_path
from cae2pipe.targets.target_set import TargetSet

TAR = "tar"
METADATA = "/zarr.json"
"""The end of the paths that no reader opens."""


class StoreUnits(Mapping[str, StoreUnit]):
    """The fields of stores' manifest entries that readers need: ``tar`` and ``zarr``, which follow from the name,
    ``samples``, and where the set is remote the ``files`` that are read.

    Args:
        names: of the stores.
    """

    def __init__(self, targets: TargetSet, names: Sequence[str]):
        self._replayed = targets.replayed is not None
        self._names = np.array(sorted(names), dtype=bytes)
        self._samples = np.array([targets.stores.samples[name] for name in sorted(names)], dtype=np.int32)
        self._columns: list[str] = []
        if not (is_local(targets.root) and is_local(targets.pixels_folder or targets.root)):
            self._sizes, self._digests = self._gather(targets, sorted(names))

    def _gather(self, targets: TargetSet, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes (stores, columns) int64, -1 for none, and SHA-256 (stores, columns, 32) uint8, of all that are read."""
        rows: list[dict[str, FileEntry]] = []
        for name in names:
            unit = targets.stores[name]
            inside = len(unit["zarr"])
            files = {path[inside:]: entry for path, entry in unit["files"].items() if path.startswith(unit["zarr"])}
            row = {path: entry for path, entry in files.items() if not path.endswith(METADATA)}
            tar = {TAR: listed(unit)[unit["tar"]]} if unit["tar"] in listed(unit) else {}
            rows.append({**row, **tar})
            self._columns += [path for path in rows[-1] if path not in self._columns]
        sizes = np.full((len(names), len(self._columns)), -1, dtype=np.int64)
        digests = np.zeros((len(names), len(self._columns), 32), dtype=np.uint8)
        for index, row in enumerate(rows):
            for path, entry in row.items():
                column = self._columns.index(path)
                sizes[index, column] = entry["bytes"]
                digests[index, column] = np.frombuffer(bytes.fromhex(entry["sha256"]), dtype=np.uint8)
        return sizes, digests

    def __getitem__(self, name: str) -> StoreUnit:
        key = name.encode()
        index = int(np.searchsorted(self._names, key))
        if index == len(self._names) or self._names[index] != key:
            raise KeyError(name)
        view, shard = of_store(name)
        tar = images_tar_path(shard) if self._replayed else view_tar_path(view, shard)
        zarr = store_path(view, shard)
        files: dict[str, FileEntry] = {}
        for column, path in enumerate(self._columns):
            if self._sizes[index, column] >= 0:
                files[tar if path == TAR else zarr + path] = {
                    "bytes": int(self._sizes[index, column]),
                    "sha256": self._digests[index, column].tobytes().hex(),
                }
        return cast(StoreUnit, {"tar": tar, "zarr": zarr, "samples": int(self._samples[index]), "files": files})

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self._names)

    def __len__(self) -> int:
        return len(self._names)
