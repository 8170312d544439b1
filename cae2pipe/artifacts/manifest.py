"""Manifests and journal entries as bytes: checked by the model of their kind whenever they are read or written.

In addition, a manifest of the formats in ``DIGESTED`` has a ``digest``: the SHA-256 of the file with 64 zeros in its
place. Journal entries have one too. Any change to either is detected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from cae2pipe.artifacts.digest import fingerprint, sha256_bytes
from cae2pipe.artifacts.json_files import check_numbers, parse_json
from cae2pipe.artifacts.manifest_kinds import KINDS, FactsT, IdentityT, Kind, Manifest, UnitT, manifests
from cae2pipe.artifacts.manifest_targets import TargetsManifest, group_entries
from cae2pipe.artifacts.manifest_text import split, text
from cae2pipe.artifacts.manifest_values import Unit
from cae2pipe.artifacts.units import Units
from cae2pipe.errors import Cae2pipeError, DamageError, ManifestError

FORMATS = {"shards": 2, "targets": 4, "run": 2, "scores": 2}
"""The newest format of each kind, used for new folders. Older folders are read, and keep their format, but for target
sets: before format 4 their stores had one group of arrays, which only ``recode --repack`` reads."""
REFERRING = 5
"""The format of target sets by reference, whose pixels lie elsewhere. Others have format 4, as before."""
NEWEST = {**FORMATS, "targets": REFERRING}
"""The newest format of each kind that is read."""
DIGESTED = {"shards": 2, "targets": 3, "run": 2, "scores": 2}
"""The first formats whose manifests and journal entries have a digest."""
GROUPED = 4
"""The first format of target sets whose stores have groups of latents."""
LIMIT = 2 * 2**30
"""Largest manifest that is read, in bytes; one of 41,000 units has 120 MB."""

AGAIN = "restore the file from a copy, or make the folder again"
BLANK = "0" * 64
SHOWN = 120


def encode_manifest(kind: str, form: int, manifest: Mapping[str, object], *, where: object) -> bytes:
    """The bytes of a manifest. Raises as ``decode_manifest``, so that nothing unreadable is written."""
    data = (seal if form >= DIGESTED[kind] else text)(manifest)
    decode_manifest(data, where)
    return data


def decode_manifest(data: bytes, where: object, seen: Callable[[str, Unit], None] | None = None) -> Manifest:
    """A manifest from its bytes. Its ``units`` are ``Units`` where the bytes have the layout that is written.

    Args:
        where: the file, for errors.
        seen: called with every unit of the result that is kept as text, while it is parsed to be validated; also if the
            manifest is refused in the end.

    Raises:
        ManifestError: not a manifest of cae2pipe, of an unknown kind or format, or with a field that does not fit its
            kind's model; the field is named. DamageError: fingerprint or digest do not match.
    """
    try:
        manifest = _unit_by_unit(data, seen) or _as_a_whole(data, where)
        check_numbers([value for name, value in manifest.items() if name != "units"])
    except ValidationError as error:
        _refuse(error, data, where)
    except ValueError as error:
        raise ManifestError(f"the manifest cannot be used: {error}", where=where, fix=AGAIN) from None
    if manifest["format"] > NEWEST[manifest["kind"]]:
        raise _other_format(manifest["kind"], manifest["format"], where)
    if manifest["kind"] == "targets" and "codec" in manifest["units"]:
        for name in ("classes", "teacher", "codec", *(["groups"] if manifest["format"] >= GROUPED else [])):
            if name not in manifest:
                raise _field(f"{name}: Field required", where)
        if "groups" in manifest:
            _check_groups(manifest, where)
    if fingerprint(manifest["identity"]) != manifest["fingerprint"]:
        raise DamageError(
            "the manifest's identity does not match its fingerprint", where=where, fix="make the folder again"
        )
    digest = manifest.pop("digest", None)
    _check_digest(digest, data, needed=manifest["format"] >= DIGESTED[manifest["kind"]], where=where)
    return manifest


def _unit_by_unit(data: bytes, seen: Callable[[str, Unit], None] | None) -> Manifest | None:
    """A valid manifest, read without holding more than one parsed unit; None if it is invalid, or in another layout."""
    parts = split(data)
    if parts is None:
        return None
    outer, units = parts
    samples: dict[str, int] = {}
    try:
        manifest: Any = manifests().validate_json(outer)
        kind = KINDS[manifest["kind"]]
        for name, unit in units.items():
            parsed: Any = kind.parse_unit(name, bytes(unit))
            if parsed is None:
                return None
            if "samples" in parsed:
                samples[name] = parsed["samples"]
            if seen:
                seen(name, parsed)
    except ValidationError:
        return None
    manifest["units"] = Units(units, samples)
    return cast(Manifest, manifest)


def _as_a_whole(data: bytes, where: object) -> Manifest:
    """A manifest in any layout. Raises ValidationError, or ManifestError for a unit that contradicts itself."""
    manifest = manifests().validate_json(data)
    known = manifest["format"] <= NEWEST[manifest["kind"]]
    if known and (contradiction := KINDS[manifest["kind"]].contradictory(manifest)):
        name, problem = contradiction
        raise _field(f"units.{name}: {problem}", where)
    return manifest


def encode_unit(kind: Kind[IdentityT, UnitT, FactsT], form: int, name: str, *, unit: UnitT, where: object) -> bytes:
    """The bytes of a unit's journal entry. Raises as ``decode_unit``."""
    data = (seal if form >= DIGESTED[kind.name] else text)(unit)
    decode_unit(kind, form, name, data=data, where=where)
    return data


def decode_unit(kind: Kind[IdentityT, UnitT, FactsT], form: int, name: str, *, data: bytes, where: object) -> UnitT:
    """A unit from its journal entry's bytes. Raises as ``decode_manifest``."""
    if not kind.names(name):
        raise ManifestError(f"{name!r} is not a unit of a {kind.name} folder", where=where, fix="remove the file")
    value = parse_json(data, where, fix="remove the file, and run the same command again")
    digest = value.pop("digest", None) if isinstance(value, dict) else None
    try:
        unit = kind.read_unit(name, value)
    except ValidationError as error:
        raise _field(_described(error.errors(include_url=False)[0], ()), where) from None
    if problem := kind.contradiction(name, unit):
        raise _field(problem, where)
    _check_digest(digest or None, data, needed=form >= DIGESTED[kind.name], where=where)
    return unit


def is_ours(data: bytes) -> bool | None:
    """Whether these are the bytes of a manifest of cae2pipe, even if damaged; None if that cannot be decided."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError:
        return None
    return isinstance(value, dict) and "format" in value and "kind" in value


def seal(value: Mapping[str, object]) -> bytes:
    """The bytes of a manifest or an entry with its digest."""
    data = text({**value, "digest": BLANK})
    return data.replace(_line(BLANK), _line(sha256_bytes(data)), 1)


def _line(digest: str) -> bytes:
    return b'\n "digest": "%s"' % digest.encode()


def _check_digest(digest: object, data: bytes, *, needed: bool, where: object) -> None:
    if digest is None and not needed:
        return
    if digest is None or _digest_with_blank(data, _line(str(digest))) != digest:
        raise DamageError(
            "the file has changed since it was written: its digest does not match", where=where, fix=AGAIN
        )


def _digest_with_blank(data: bytes, line: bytes) -> str:
    """The SHA-256 of the data with zeros for the digest in ``line``; without a copy, since they may have gigabytes."""
    view, start = memoryview(data), data.find(line)
    digest = hashlib.sha256(view[: max(0, start)])
    if start >= 0:
        digest.update(_line(BLANK))
    digest.update(view[start + len(line) if start >= 0 else 0 :])
    return digest.hexdigest()


def _check_groups(manifest: TargetsManifest, where: object) -> None:
    """Raise ManifestError unless the groups are those of the set's teacher and codec."""
    teacher, codec = manifest["teacher"], manifest["identity"]["settings"]["codec"]
    for group, entry in group_entries(teacher, codec["name"], codec["level"]).items():
        there = manifest["groups"].get(group)
        if there is None:
            raise _field(f"groups.{group}: Field required", where)
        for name, value in entry.items():
            if there.get(name) != value:
                raise _field(f"groups.{group}.{name}: the teacher or the codec has {_short(value)}", where)


def _refuse(error: ValidationError, data: bytes, where: object) -> NoReturn:
    """Raise the ManifestError that best explains what is wrong with a manifest."""
    value = parse_json(data, where, fix=AGAIN)
    if not isinstance(value, dict) or "format" not in value or "kind" not in value:
        raise ManifestError("this manifest.json was not written by cae2pipe", where=where, fix="check the path")
    kind, form = value["kind"], value["format"]
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ManifestError(f"kind: {_short(kind)} is unknown to this version of cae2pipe", where=where, fix=AGAIN)
    if type(form) is not int or not 1 <= form <= NEWEST[kind]:
        raise _other_format(kind, form, where)
    errors = error.errors(include_url=False, include_context=False)
    if missing := sorted(str(e["loc"][1]) for e in errors if len(e["loc"]) == 2 and e["type"] == "missing"):
        raise ManifestError(f"the manifest lacks {', '.join(missing)}", where=where, fix=AGAIN)
    # Locations begin with the kind. In units they contain the name of the model that was tried; only the model of the
    # unit's own name is relevant.
    for each in errors:
        if len(each["loc"]) > 3 and each["loc"][1] == "units" and KINDS[kind].names(str(each["loc"][2])):
            if each["loc"][3] == KINDS[kind].unit_model(str(each["loc"][2])).__name__:
                raise _field(_described(each, (0, 3)), where)
        else:
            raise _field(_described(each, (0,)), where)
    raise _field(_described(errors[0], (0,)), where)


def _other_format(kind: str, form: object, where: object) -> ManifestError:
    return ManifestError(
        f"the manifest has format {_short(form)}, and this version of cae2pipe reads format {NEWEST[kind]}",
        where=where,
        fix="use the version of cae2pipe that wrote it (newer formats need a newer version)",
    )


def _described(error: ErrorDetails, left_out: tuple[int, ...]) -> str:
    parts = [str(part) for index, part in enumerate(error["loc"]) if index not in left_out]
    got = error["input"]
    shown = "" if error["type"] == "missing" or isinstance(got, dict | list) else f"; got {_short(got)}"
    return f"{_short('.'.join(parts), str)}: {error['msg']}{shown}"


def _short(value: object, show: Callable[[object], str] = repr) -> str:
    shown = str(show(value))
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."


def _field(problem: str, where: object) -> Cae2pipeError:
    return ManifestError(f"invalid field: {problem}", where=where, fix=AGAIN)
