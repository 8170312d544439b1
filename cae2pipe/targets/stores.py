"""The stores of a target set by name, taken from its manifest whenever one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest_targets import StoreUnit
from cae2pipe.targets.paths import images_name, is_store, of_store


class Stores(Mapping[str, StoreUnit]):
    """The stores ``names`` of a set. A replayed view's files are its latents and the images that it is cut from."""

    def __init__(self, artifact: TargetsArtifact, names: Iterable[str], *, replayed: bool):
        self._artifact = artifact
        self._names = dict.fromkeys(names)
        self._replayed = replayed

    @classmethod
    def all_of(cls, artifact: TargetsArtifact, *, replayed: bool) -> Stores:
        """Every store that the manifest lists."""
        return cls(artifact, filter(is_store, artifact.units), replayed=replayed)

    def only(self, names: Iterable[str]) -> Stores:
        """Some of these stores."""
        return Stores(self._artifact, names, replayed=self._replayed)

    @functools.cached_property
    def samples(self) -> dict[str, int]:
        """Samples of every store."""
        units = self._artifact.units
        return {name: units.samples(name) for name in self._names}

    def __getitem__(self, name: str) -> StoreUnit:
        if name not in self._names:
            raise KeyError(name)
        unit = self._artifact.units[name]
        assert "view" in unit, "a unit's name says what it is"
        if not self._replayed:
            return unit
        images = self._artifact.units[images_name(of_store(name).shard)]
        assert "view" not in images
        assert "shard" in images
        whole: StoreUnit = {**unit, "files": {**unit["files"], **images["files"]}}
        if "pixels" in images:
            whole["pixels"] = images["pixels"]
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
