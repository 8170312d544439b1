"""The groups of latents of a set: ``patches``, and what else the set stores of its teacher.

    patches    all tokens of the last layer: the class token, if there is one, and the patches
    summary    the model's own output for the whole image, as one token of its own width
    layer-NN   the tokens of block NN

Each has a calibration of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest_targets import FidelityReached, GroupReached, StoreBytes, layer_group
from cae2pipe.artifacts.manifest_values import GroupEntry
from cae2pipe.targets.calibration import Calibration, make_codec, summarise
from cae2pipe.targets.store_layout import PATCHES, StoreLayout
from cae2pipe.targets.stored_calibration import read_calibrations
from cae2pipe.teachers.protocol import TeacherOutput

SUMMARY = "summary"
LAYER = "layer-"

Cosines = tuple[Tensor, Tensor]
"""Raw and centred cosines between true and stored tokens, float32 (b * T,)."""


@dataclass(frozen=True)
class Group:
    """A group of latents: its layout in every store, and its calibration."""

    layout: StoreLayout
    calibration: Calibration


Groups = Mapping[str, Group]
"""Groups by name, ``patches`` first."""


def make_groups(entries: Mapping[str, GroupEntry], calibrations: Mapping[str, Calibration]) -> dict[str, Group]:
    """The groups of a set, from their entries in the manifest."""
    names = [PATCHES, *sorted(entries.keys() - {PATCHES})]
    return {name: Group(make_layout(entries[name], calibrations[name], name), calibrations[name]) for name in names}


def read_groups(artifact: TargetsArtifact) -> dict[str, Group]:
    """The groups of a set. Raises DamageError as ``read_calibration``."""
    return make_groups(artifact.facts["groups"], read_calibrations(artifact))


def make_layout(entry: GroupEntry, calibration: Calibration, group: str = PATCHES) -> StoreLayout:
    """The layout of a group in all stores of a set, from its entry in the manifest."""
    patches = entry["rows"] * entry["cols"]
    return StoreLayout(
        tokens=patches + entry["class_token"],
        dim=entry["dim"],
        patches=patches,
        attention=entry["attention"],
        codec=make_codec(entry["codec"], calibration, entry["level"]),
        group=group,
    )


def layer_of(group: str) -> int | None:
    """The number of the block whose tokens a group holds; None for other groups."""
    return int(group.removeprefix(LAYER)) if group.startswith(LAYER) else None


def group_tokens(output: TeacherOutput, group: str) -> Tensor:
    """The tokens of a group (B, T, D) in a teacher's output."""
    layer = layer_of(group)
    if layer is not None:
        return output.layers[layer]
    if group == PATCHES:
        return output.tokens
    assert output.summary is not None, "a teacher whose info has a summary gives one"
    return output.summary.unsqueeze(1)


def groups_in(output: TeacherOutput) -> list[str]:
    """The groups of a teacher's output, ``patches`` first."""
    summary = [] if output.summary is None else [SUMMARY]
    return [PATCHES, *sorted([*summary, *map(layer_group, output.layers)])]


def reached(cosines: Sequence[Mapping[str, Cosines]]) -> dict[str, FidelityReached]:
    """The fidelity of each group, from the cosines of its blocks."""
    return {
        name: summarise(*(torch.cat([block[name][part] for block in cosines]) for part in (0, 1))).entry()
        for name in cosines[0]
    }


class StoreFacts(TypedDict):
    """What a store's manifest entry says about its latents and pixels."""

    fidelity: FidelityReached
    bytes: StoreBytes
    groups: NotRequired[dict[str, GroupReached]]


def store_facts(
    layouts: Iterable[StoreLayout],
    zarr: str,
    files: Mapping[str, Mapping[str, Any]],
    fidelity: Mapping[str, FidelityReached],
    *,
    pixels: int,
) -> StoreFacts:
    """A store's facts. ``zarr``: its path, ``files``: its entries; ``fidelity``: by group; ``pixels``: their bytes."""
    latents = {own.group: own.latent_bytes(zarr, files) for own in layouts}
    more: dict[str, GroupReached] = {
        name: {"fidelity": fidelity[name], "bytes": size} for name, size in latents.items() if name != PATCHES
    }
    facts: StoreFacts = {
        "fidelity": fidelity[PATCHES],
        "bytes": {"latents": sum(latents.values()), "pixels": pixels},
    }
    return {**facts, "groups": more} if more else facts
