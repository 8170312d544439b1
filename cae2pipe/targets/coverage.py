"""Which views of which shards a target set has, and the number of images per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cae2pipe.targets.paths import is_store, of_store, store_name
from cae2pipe.targets.target_set import TargetSet

ABSENT, PRESENT, DAMAGED = 0, 1, 2


@dataclass(frozen=True)
class Coverage:
    """State of the stores of the complete set.

    ``shards``: names, then "" for each shard whose name is not known yet. ``cells``: uint8 (views, shards),
    ``ABSENT``, ``PRESENT`` or ``DAMAGED``.
    """

    shards: list[str]
    cells: np.ndarray

    @property
    def views(self) -> int:
        return int(self.cells.shape[0])

    @property
    def complete(self) -> bool:
        return bool((self.cells == PRESENT).all())

    def names(self, state: int) -> list[str]:
        """The stores in a state: ``v00/000123``, or ``v00/?`` if the shard's name is not known yet."""
        return [
            store_name(int(view), self.shards[shard] or "?")
            for view, shard in np.argwhere(self.cells == state).tolist()
        ]


def coverage(targets: TargetSet, shards: Sequence[str] = ()) -> Coverage:
    """The coverage of a set. ``shards``: names of its shard set's shards, if available."""
    # Sets of older versions do not record this.
    wanted = targets.artifact.facts.get("wanted", {"views": 0, "shards": 0})
    stores = {name: of_store(name) for name in targets.artifact.units if is_store(name)}
    views = max(wanted["views"], *(store.view + 1 for store in stores.values()))
    names = sorted({*shards, *(store.shard for store in stores.values())})
    names += [""] * (wanted["shards"] - len(names))
    column = {name: index for index, name in enumerate(names)}
    cells = np.full((views, len(names)), ABSENT, dtype=np.uint8)
    for name, (view, shard) in stores.items():
        cells[view, column[shard]] = PRESENT if name in targets.stores else DAMAGED
    return Coverage(names, cells)


def one_store_a_shard(targets: TargetSet) -> list[str]:
    """The first stored view of every shard, sorted by shard."""
    first: dict[str, str] = {}
    for name in sorted(targets.stores):
        first.setdefault(of_store(name).shard, name)
    return [first[shard] for shard in sorted(first)]


def class_counts(labels: np.ndarray, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Number of images of every class, most first. A label of -1 means no class."""
    counts = Counter(labels[labels >= 0].tolist())
    return sorted(((name, counts[label]) for label, name in enumerate(classes)), key=lambda item: (-item[1], item[0]))
