"""Names of a target set's units, and the paths of their files: built here and nowhere else.

``cae2pipe/artifacts/manifest_targets.py`` checks the names in a manifest independently.
"""

from __future__ import annotations

from typing import NamedTuple

CODEC = "codec"
"""The unit of the calibration."""
CODEC_FOLDER = "codec.zarr"
SHARDS_FOLDER = "shards"
"""The shard set, where ``extract-targets`` was given a folder of images."""
TEACHERS_FOLDER = "teachers"
"""The sets of teachers that were added, each in a folder named by its label."""
IMAGES_FOLDER, VIEWS_FOLDER, LATENTS_FOLDER = "images", "views", "latents"


def store_name(view: int, shard: str) -> str:
    """The unit of a view of a shard: ``v00/000123``."""
    return f"v{view:02d}/{shard}"


class StoreName(NamedTuple):
    """What a store's name says."""

    view: int
    shard: str


def is_store(unit: str) -> bool:
    """Whether this is the name of a store, and not of another unit."""
    return unit.startswith("v")


def of_store(name: str) -> StoreName:
    """View and shard of a store, from its name in a manifest, which is that of its content."""
    view, shard = name.split("/")
    return StoreName(int(view[1:]), shard)


def store_path(view: int, shard: str) -> str:
    """Its latents."""
    return f"{LATENTS_FOLDER}/{store_name(view, shard)}.zarr"


def view_tar_path(view: int, shard: str) -> str:
    """Its pixels, where views are stored."""
    return f"{VIEWS_FOLDER}/{store_name(view, shard)}.tar"


def images_name(shard: str) -> str:
    """The unit of the images that a shard's replayed views are cut from: ``images/000123``."""
    return f"{IMAGES_FOLDER}/{shard}"


def images_tar_path(shard: str) -> str:
    """Their tar."""
    return f"{images_name(shard)}.tar"


def images_index_path(shard: str) -> str:
    """Where each of them is in the tar."""
    return f"{images_name(shard)}.json"
