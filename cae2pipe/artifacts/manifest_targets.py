"""Manifests of target sets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import (
    INSIDE_ZARR,
    OPEN,
    SAMPLE_BYTES,
    SHARD,
    STRICT,
    VIEW,
    Count,
    FileEntry,
    Format,
    Names,
    Sha256,
    ShardName,
    Teacher,
    Values,
)

StoreFile = Annotated[
    str, Field(pattern=rf"^(views/{VIEW}/{SHARD}\.tar|latents/{VIEW}/{SHARD}\.zarr{INSIDE_ZARR})$", max_length=120)
]
ImagesFile = Annotated[str, Field(pattern=rf"^images/{SHARD}\.(tar|json)$")]
CodecFile = Annotated[str, Field(pattern=rf"^codec\.zarr{INSIDE_ZARR}$", max_length=120)]
Samples = Annotated[int, Field(ge=1, lt=2**53)]


class FidelityReached(TypedDict):
    """Cosines between true and stored tokens: mean and 1st percentile, raw and with the mean token removed."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    mean: float
    p1: float
    centred_mean: float
    centred_p1: float


class StoreBytes(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    latents: Count
    pixels: Count


class ImagesBytes(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    pixels: Count


class Store(TypedDict):
    """The unit ``v00/000123``: a view of a shard. ``recoded``: the fingerprint of the one it came from."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[StoreFile, FileEntry]
    view: Annotated[int, Field(ge=0, lt=10**6)]
    shard: ShardName
    source: Sha256
    samples: Samples
    tar: str
    zarr: str
    fidelity: FidelityReached
    bytes: StoreBytes
    recoded: NotRequired[Sha256]


class Images(TypedDict):
    """The unit ``images/000123``: the images that a shard's replayed views are cut from."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[ImagesFile, FileEntry]
    shard: ShardName
    source: Sha256
    samples: Samples
    tar: str
    bytes: ImagesBytes


class Codec(TypedDict):
    """The unit ``codec``: the calibration."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[CodecFile, FileEntry]
    samples: Samples


class CodecIdentity(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    name: Literal["klt", "int8", "fp16"]
    fidelity: Annotated[float, Field(gt=0.5, lt=1)]
    level: Annotated[int, Field(ge=1, le=9)]


class SettingsIdentity(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    codec: CodecIdentity
    view: Values
    teacher: Values


class TeacherIdentity(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    name: str
    library: str
    weights: str


class Recoded(TypedDict):
    """What a recoded set came from."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    codec: Values
    calibration: dict[CodecFile, FileEntry]


class Identity(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    settings: SettingsIdentity
    teacher: TeacherIdentity
    recoded: NotRequired[Recoded]


class Expected(TypedDict):
    """Bytes that calibration expects: of a view's latents, and of the pixels of a view or an image."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    latents: Count
    pixels: Count


class CodecFacts(TypedDict):
    """What calibration found. ``step``: of klt."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    held_out_fidelity: FidelityReached
    step: float | None
    expected_bytes: NotRequired[Expected]


class Wanted(TypedDict):
    """What the whole set is to hold."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    views: Annotated[int, Field(ge=1, le=10**6)]
    shards: Count
    images: Count


class Extracted(TypedDict):
    """The provenance of the set that a recoded one came from."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    versions: NotRequired[dict[str, str]]
    processor: NotRequired[str]


class TargetsManifest(TypedDict):
    """``manifest.json`` of a target set."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    format: Format
    kind: Literal["targets"]
    identity: Identity
    fingerprint: Sha256
    digest: NotRequired[Sha256]
    units: dict[
        Annotated[str, Field(pattern=f"^(codec|images/{SHARD}|{VIEW}/{SHARD})$")],
        # The commonest first: it is tried first.
        Annotated[Store | Images | Codec, Field(union_mode="left_to_right")],
    ]
    complete: bool
    classes: NotRequired[Names]
    teacher: NotRequired[Teacher]
    codec: NotRequired[CodecFacts]
    wanted: NotRequired[Wanted]
    versions: NotRequired[dict[str, str]]
    processor: NotRequired[str]
    extracted: NotRequired[Extracted]


def unit_model(name: str) -> type[Any]:
    """The model of the unit of this name."""
    if name == "codec":
        return Codec
    return Images if name.startswith("images/") else Store


def contradiction(name: str, unit: dict[str, Any]) -> str | None:
    """What of a valid unit contradicts its name, or itself; None where nothing does."""
    files = unit["files"]
    if unit_model(name) is not (Store if "view" in unit else Images if "shard" in unit else Codec):
        return "these are the fields of another kind of unit"
    if name == "codec":
        return None
    shard, tar = unit["shard"], unit["tar"]
    if name.startswith("images/"):
        if name != f"images/{shard}" or tar != f"{name}.tar":
            return "shard, tar: these are not the unit's own"
        if files.keys() != {tar, f"{name}.json"}:
            return f"files: these are not {tar} and {name}.json"
    else:
        zarr = unit["zarr"]
        if name != f"v{unit['view']:02d}/{shard}" or zarr != f"latents/{name}.zarr":
            return "view, shard, zarr: these are not the unit's own"
        stored = tar == f"views/{name}.tar"
        if (not stored and tar != f"images/{shard}.tar") or stored != (tar in files):
            return "tar: this is not the unit's own"
        own = files.keys() - {tar}
        # What lies between two paths of one beginning has it too.
        if not (own and min(own).startswith(f"{zarr}/") and max(own).startswith(f"{zarr}/")):
            return "files: not all of these are the unit's own"
        labels = files.get(f"{zarr}/labels/c/0")
        if labels is None or labels["bytes"] != 4 * unit["samples"] + 4:
            return f"samples: the store does not have the labels of {unit['samples']}"
    if tar in files and unit["samples"] * SAMPLE_BYTES > files[tar]["bytes"]:
        return f"samples: the tar is too small for {unit['samples']}"
    return None
