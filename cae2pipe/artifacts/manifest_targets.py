"""Manifests of target sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, final

from pydantic import Field, with_config
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import (
    INSIDE_ZARR,
    OPEN,
    SAMPLE_BYTES,
    SHARD,
    STRICT,
    VIEW,
    CodecName,
    Common,
    Count,
    FileEntry,
    GroupEntry,
    GroupName,
    Licences,
    Names,
    Sha256,
    ShardName,
    TeacherEntry,
    Values,
)

StoreFile = Annotated[
    str, Field(pattern=rf"^(views/{VIEW}/{SHARD}\.tar|latents/{VIEW}/{SHARD}\.zarr{INSIDE_ZARR})$", max_length=120)
]
ImagesFile = Annotated[str, Field(pattern=rf"^images/{SHARD}\.(tar|json)$")]
CodecFile = Annotated[str, Field(pattern=rf"^codec\.zarr{INSIDE_ZARR}$", max_length=120)]
Samples = Annotated[int, Field(ge=1, lt=2**31)]


@with_config(STRICT)
class FidelityReached(TypedDict):
    """Cosines between true and stored tokens: mean and 1st percentile, raw and with the mean token removed."""

    mean: float
    p1: float
    centred_mean: float
    centred_p1: float


FIGURES: tuple[Literal["mean", "p1", "centred_mean", "centred_p1"], ...]
FIGURES = ("mean", "p1", "centred_mean", "centred_p1")


@with_config(STRICT)
class StoreBytes(TypedDict):
    latents: Count
    pixels: Count


@with_config(STRICT)
class GroupReached(TypedDict):
    """A group of a store besides the patches: fidelity, and bytes of its latents."""

    fidelity: FidelityReached
    bytes: Count


@with_config(STRICT)
class ImagesBytes(TypedDict):
    pixels: Count


@final
@with_config(STRICT)
class StoreUnit(TypedDict):
    """The unit ``v00/000123``: a view of a shard. ``fidelity`` is that of the patches, ``bytes`` of all groups;
    ``groups``: the others. ``recoded``: the fingerprint of its source, if recoded. ``pixels``: the files of a set by
    reference that lie elsewhere."""

    files: dict[StoreFile, FileEntry]
    pixels: NotRequired[dict[StoreFile, FileEntry]]
    view: Annotated[int, Field(ge=0, lt=10**6)]
    shard: ShardName
    source: Sha256
    samples: Samples
    tar: str
    zarr: str
    fidelity: FidelityReached
    bytes: StoreBytes
    groups: NotRequired[dict[GroupName, GroupReached]]
    recoded: NotRequired[Sha256]


@final
@with_config(STRICT)
class ImagesUnit(TypedDict):
    """The unit ``images/000123``: the images that a shard's replayed views are cropped from. ``pixels``: as above."""

    files: dict[ImagesFile, FileEntry]
    pixels: NotRequired[dict[ImagesFile, FileEntry]]
    shard: ShardName
    source: Sha256
    samples: Samples
    tar: str
    bytes: ImagesBytes


@final
@with_config(STRICT)
class CodecUnit(TypedDict):
    """The unit ``codec``: the calibration."""

    files: dict[CodecFile, FileEntry]
    samples: Samples


@with_config(OPEN)
class CodecIdentity(TypedDict):
    name: CodecName
    fidelity: Annotated[float, Field(gt=0.5, lt=1)]
    level: Annotated[int, Field(ge=1, le=9)]


@with_config(OPEN)
class SettingsIdentity(TypedDict):
    codec: CodecIdentity
    view: Values
    teacher: Values


@with_config(OPEN)
class TeacherIdentity(TypedDict):
    name: str
    library: str
    weights: str
    precision: NotRequired[str]


@with_config(OPEN)
class Recoded(TypedDict):
    """The source of a recoded set."""

    codec: Values
    calibration: dict[CodecFile, FileEntry]


@with_config(OPEN)
class TargetsIdentity(TypedDict):
    settings: SettingsIdentity
    teacher: TeacherIdentity
    recoded: NotRequired[Recoded]


@with_config(OPEN)
class Expected(TypedDict):
    """Bytes predicted by calibration: of a view's latents, and of the pixels of a view or an image."""

    latents: Count
    pixels: Count


@with_config(OPEN)
class GroupFacts(TypedDict):
    """The result of calibration on a group besides the patches. ``bytes``: predicted, of a view."""

    held_out_fidelity: FidelityReached
    step: float | None
    bytes: NotRequired[Count]


@with_config(OPEN)
class CodecFacts(TypedDict):
    """The result of calibration: on the patches, and on other ``groups``. ``step``: klt only. ``expected_bytes`` are of
    all groups."""

    held_out_fidelity: FidelityReached
    step: float | None
    expected_bytes: NotRequired[Expected]
    groups: NotRequired[dict[GroupName, GroupFacts]]


@with_config(OPEN)
class Wanted(TypedDict):
    """What the complete set will hold."""

    views: Annotated[int, Field(ge=1, le=10**6)]
    shards: Count
    images: Count


@with_config(OPEN)
class Extracted(TypedDict):
    """The provenance of a recoded set's source."""

    versions: NotRequired[dict[str, str]]
    processor: NotRequired[str]


@with_config(OPEN)
class TargetsFacts(TypedDict):
    """All but ``wanted`` and ``licences`` are present once the set is calibrated."""

    classes: NotRequired[Names]
    teacher: NotRequired[TeacherEntry]
    codec: NotRequired[CodecFacts]
    groups: NotRequired[dict[GroupName, GroupEntry]]
    wanted: NotRequired[Wanted]
    licences: NotRequired[Licences]
    versions: NotRequired[dict[str, str]]
    processor: NotRequired[str]
    extracted: NotRequired[Extracted]


@with_config(OPEN)
class TargetsManifest(Common, TargetsFacts):
    """``manifest.json`` of a target set."""

    kind: Literal["targets"]
    identity: TargetsIdentity
    units: dict[
        Annotated[str, Field(pattern=f"^(codec|images/{SHARD}|{VIEW}/{SHARD})$")],
        # The most frequent first: models are tried in this order.
        Annotated[StoreUnit | ImagesUnit | CodecUnit, Field(union_mode="left_to_right")],
    ]


def listed(unit: Mapping[str, Any]) -> dict[str, FileEntry]:
    """All files that a unit lists, also those that lie elsewhere."""
    return {**unit.get("pixels", {}), **unit["files"]}


def group_entry(teacher: TeacherEntry, codec: CodecName, level: int) -> GroupEntry:
    """The manifest's entry of the group ``patches``."""
    return {
        "codec": codec,
        "level": level,
        "dim": teacher["dim"],
        "rows": teacher["rows"],
        "cols": teacher["cols"],
        "class_token": teacher["class_token"],
        "attention": teacher["attention"],
    }


def group_entries(teacher: TeacherEntry, codec: CodecName, level: int) -> dict[GroupName, GroupEntry]:
    """The manifest's entries of all groups that a set of this teacher has, ``patches`` first."""
    patches = group_entry(teacher, codec, level)
    entries = {"patches": patches}
    if summary := teacher.get("summary"):
        pooled: GroupEntry = {**patches, "dim": summary, "rows": 0, "cols": 0, "class_token": True}
        entries["summary"] = {**pooled, "attention": False}
    for layer in teacher.get("layers", []):
        entries[layer_group(layer)] = {**patches, "attention": False}
    return entries


def layer_group(layer: int) -> GroupName:
    """The group of the tokens of a block of the teacher, by the block's number."""
    return f"layer-{layer:02d}"


def unit_model(name: str) -> type[StoreUnit | ImagesUnit | CodecUnit]:
    """The model of a unit, by its name."""
    if name == "codec":
        return CodecUnit
    return ImagesUnit if name.startswith("images/") else StoreUnit


def contradiction(name: str, unit: StoreUnit | ImagesUnit | CodecUnit) -> str | None:
    """How a valid unit contradicts its name, or itself; None if it does not."""
    if unit_model(name) is not (StoreUnit if "view" in unit else ImagesUnit if "shard" in unit else CodecUnit):
        return "these are the fields of another kind of unit"
    if "view" in unit:
        return _of_store(name, unit)
    return _of_images(name, unit) if "shard" in unit else None


def _of_store(name: str, unit: StoreUnit) -> str | None:
    files, shard, tar, zarr = unit["files"], unit["shard"], unit["tar"], unit["zarr"]
    if name != f"v{unit['view']:02d}/{shard}" or zarr != f"latents/{name}.zarr":
        return "view, shard, zarr: they do not match the unit's name"
    stored = tar == f"views/{name}.tar"
    if (not stored and tar != f"images/{shard}.tar") or stored != (tar in listed(unit)):
        return "tar: it does not match the unit's name"
    if "pixels" in unit and (unit["pixels"].keys() != {tar} or tar in files):
        return "pixels: they are not the unit's"
    own = files.keys() - {tar}
    # In sorted order, all paths between two with this prefix have it too.
    if not (own and min(own).startswith(f"{zarr}/") and max(own).startswith(f"{zarr}/")):
        return "files: not all of them belong to the unit"
    if not _has_records(files.get(f"{zarr}/samples/c/0/0"), files.get(f"{zarr}/labels/c/0"), unit["samples"]):
        return f"samples: the store does not have {unit['samples']} records"
    return _too_small(unit)


def _has_records(records: FileEntry | None, labels: FileEntry | None, samples: int) -> bool:
    """Whether a store has that many samples, by the size of its records; of its labels before format 4."""
    if records is not None:
        return records["bytes"] > 4 and (records["bytes"] - 4) % samples == 0
    return labels is not None and labels["bytes"] == 4 * samples + 4


def _of_images(name: str, unit: ImagesUnit) -> str | None:
    tar = unit["tar"]
    if name != f"images/{unit['shard']}" or tar != f"{name}.tar":
        return "shard, tar: they do not match the unit's name"
    if unit.get("pixels", unit["files"]).keys() != {tar, f"{name}.json"} or ("pixels" in unit and unit["files"]):
        return f"files: expected {tar} and {name}.json"
    return _too_small(unit)


def _too_small(unit: StoreUnit | ImagesUnit) -> str | None:
    tar = listed(unit).get(unit["tar"])
    if tar is not None and unit["samples"] * SAMPLE_BYTES > tar["bytes"]:
        return f"samples: the tar is too small for {unit['samples']}"
    return None
