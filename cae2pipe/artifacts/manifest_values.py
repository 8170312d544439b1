"""The value types of all kinds of manifest, and their limits. Types are strict and numbers finite."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, JsonValue, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For objects that other versions may not extend."""
OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""For objects that other versions may extend."""

SHARD = r"[0-9]{6,9}"
"""A shard's name: its number."""
VIEW = r"v[0-9]{2,6}"
"""A view's name."""
GROUP = r"(patches|summary|layer-[0-9]{2})"
"""A group of latents: all tokens of the last layer, the pooled output, or the tokens of another layer."""
INSIDE_ZARR = rf"(/{GROUP})?(/[a-z_]{{1,32}})?(/zarr\.json|(/c(/[0-9]{{1,9}}){{1,5}}))"
"""The path of a file in a Zarr group of arrays, or of groups of arrays."""

ShardName = Annotated[str, Field(pattern=f"^{SHARD}$")]
CodecName = Literal["klt", "int8", "fp16"]
GroupName = Annotated[str, Field(pattern=f"^{GROUP}$")]
StoreName = Annotated[str, Field(pattern=f"^{VIEW}/{SHARD}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Format = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A number of bytes, samples, images, ..."""
Size = Annotated[int, Field(ge=1, le=2**20)]
"""A dimension."""
Side = Annotated[int, Field(ge=1, le=1024)]
"""Rows or columns of patches."""
Names = list[str]
Values = dict[str, JsonValue]

SAMPLE_BYTES = 1024
"""Fewest bytes of a sample in a tar: two headers."""


@with_config(STRICT)
class FileEntry(TypedDict):
    """A file of a unit, under its path relative to the folder."""

    bytes: Count
    sha256: Sha256


class Unit(TypedDict):
    """The fields of every unit."""

    files: dict[str, FileEntry]


@with_config(OPEN)
class Common(TypedDict):
    """The fields of every manifest besides ``kind``, ``identity`` and ``units``."""

    format: Format
    fingerprint: Sha256
    digest: NotRequired[Sha256]
    complete: bool


@with_config(OPEN)
class GroupEntry(TypedDict):
    """How a group of latents is stored: codec, dimensions, and tokens: the class token, then a grid of patches. A
    summary is one token without patches."""

    codec: CodecName
    level: Annotated[int, Field(ge=1, le=9)]
    dim: Size
    rows: Annotated[int, Field(ge=0, le=1024)]
    cols: Annotated[int, Field(ge=0, le=1024)]
    class_token: bool
    attention: bool


@with_config(OPEN)
class TeacherEntry(TypedDict):
    """What readers need to know about a teacher. ``summary``: its width, if there is one. ``layers``: the blocks whose
    tokens are stored besides those of the last."""

    name: str
    dim: Size
    rows: Side
    cols: Side
    class_token: bool
    attention: bool
    summary: NotRequired[Size]
    layers: NotRequired[list[Annotated[int, Field(ge=0, le=99)]]]
