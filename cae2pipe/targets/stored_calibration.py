"""A set's calibration on disk: ``codec.zarr``, a Zarr group with one for each group of latents, checked against the
manifest's digests.

Every array is one chunk, which is read directly: no metadata of a set decides how its bytes are interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import TargetsArtifact, check_files
from cae2pipe.artifacts.digest import sha256_bytes
from cae2pipe.artifacts.staging import staged
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.config.extract import CodecSettings
from cae2pipe.errors import DamageError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.calibration import Calibration, Fidelity, calibrate
from cae2pipe.targets.chunks import ChunkError, decode_chunk
from cae2pipe.targets.paths import CODEC, CODEC_FOLDER
from cae2pipe.targets.store import rebuild_fix
from cae2pipe.targets.store_layout import PATCHES

TOKEN_BASIS = "token_basis"

Fitted = tuple[Calibration, Fidelity]
"""A new calibration, and the fidelity that it reaches on held-out images."""


def store_calibration(
    artifact: TargetsArtifact,
    codec: CodecSettings,
    samples: Iterable[tuple[str, Tensor]],
    *,
    facts: Callable[[Mapping[str, Fitted]], Mapping[str, Any]],
    report: Report,
) -> None:
    """Fit a set's calibration and store it, or restore the one it had.

    Args:
        samples: groups of latents, one after the other, with unit tokens (N, T, D) of view 0 of the first images.
        facts: makes the manifest entries from the new calibrations of the groups.

    Raises:
        DamageError: the set had a calibration, and it cannot be reproduced.
    """
    fitted: dict[str, Fitted] = {}
    images, rotate = 0, rotates_tokens(artifact)
    for group, sample in samples:
        fitted[group] = calibrate(sample, codec.name, codec.fidelity, level=codec.level, rotate_tokens=rotate)
        images = len(sample)
    calibrations = {group: calibration for group, (calibration, _) in fitted.items()}
    if CODEC in artifact.units:
        restore_calibration(artifact, calibrations)
        return
    artifact.add_facts(facts(fitted))
    # The facts first: a codec without them would count as a finished calibration.
    artifact.save()
    with staged(artifact.root, CODEC) as stage:
        write_calibration(stage.path(CODEC_FOLDER), calibrations)
        artifact.add(CODEC, {"files": stage.commit(CODEC_FOLDER), "samples": images})
    for group, (_, fidelity) in fitted.items():
        of = "" if group == PATCHES else f", {group}"
        report.log(
            f"fidelity on held-out images{of}: mean cosine {fidelity.mean:.5f}, 1st percentile {fidelity.p1:.5f}"
        )


def write_calibration(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Write the local folder ``codec.zarr``, with the calibrations of groups of latents by name."""
    import zarr

    root = zarr.create_group(path, zarr_format=3, overwrite=True)
    for name, calibration in calibrations.items():
        _write_group(root.create_group(name), calibration)


def _write_group(group: Any, calibration: Calibration) -> None:
    from zarr.codecs import Crc32cCodec

    arrays = {"mean": calibration.mean.numpy()}
    if calibration.basis is not None and calibration.step is not None:
        arrays |= {"basis": calibration.basis.numpy(), "step": np.array([calibration.step], dtype="<f4")}
    if calibration.token_basis is not None and calibration.spread is not None:
        arrays |= {TOKEN_BASIS: calibration.token_basis.numpy(), "spread": calibration.spread.numpy()}
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


def rotates_tokens(artifact: TargetsArtifact) -> bool:
    """Whether the set's klt codec also rotates along the tokens. In sets calibrated by older versions it does not."""
    files = artifact.units[CODEC]["files"] if CODEC in artifact.units else {}
    return not any("/basis/" in path for path in files) or any(f"/{TOKEN_BASIS}/" in path for path in files)


def is_calibrated(artifact: TargetsArtifact) -> bool:
    """Whether the set's calibration is complete and unchanged, byte for byte."""
    return CODEC in artifact.units and not check_files(artifact, [CODEC])


def restore_calibration(artifact: TargetsArtifact, calibrations: Mapping[str, Calibration]) -> None:
    """Restore lost calibrations, if they equal those that the stores were written with.

    Raises:
        DamageError: it differs.
    """
    with staged(artifact.root, CODEC) as stage:
        write_calibration(stage.path(CODEC_FOLDER), calibrations)
        if stage.entries(CODEC_FOLDER) != artifact.units[CODEC]["files"]:
            raise DamageError(
                "the set's calibration is damaged and cannot be reproduced on this machine",
                where=artifact.root / CODEC_FOLDER,
                fix="repair it on a machine like the one that made it, restore it from a copy, or make the set again",
            )
        stage.commit(CODEC_FOLDER)


def read_calibration(artifact: TargetsArtifact, group: str = PATCHES) -> Calibration:
    """The calibration of a group of latents; "": of a set that has no groups yet.

    Raises:
        DamageError: one of its files is missing or has changed since it was written, or does not fit the codec and
        teacher of this set.
    """
    return _decoded(artifact, group, _contents(artifact))


def read_calibrations(artifact: TargetsArtifact) -> dict[str, Calibration]:
    """The calibrations of all groups of latents. Raises as ``read_calibration``."""
    contents = _contents(artifact)
    return {group: _decoded(artifact, group, contents) for group in artifact.facts["groups"]}


def _contents(artifact: TargetsArtifact) -> dict[str, bytes]:
    """The files of the calibration. Raises DamageError."""
    contents = {}
    for name, entry in artifact.units[CODEC]["files"].items():
        try:
            data = read_bytes(artifact.root / name)
        except OSError as error:
            reraise_exhaustion(error)
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise _damage(f"one of its files {what}", artifact.root / name, artifact.root) from None
        if sha256_bytes(data) != entry["sha256"]:
            raise _damage("one of its files has changed since it was written", artifact.root / name, artifact.root)
        contents[name] = data
    return contents


def _decoded(artifact: TargetsArtifact, group: str, files: Mapping[str, bytes]) -> Calibration:
    path, prefix = artifact.root / CODEC_FOLDER, f"{CODEC_FOLDER}/{group}/" if group else f"{CODEC_FOLDER}/"
    contents = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
    shape = artifact.facts["groups"][group] if group else artifact.facts["teacher"]
    codec = artifact.facts["groups"][group]["codec"] if group else artifact.identity["settings"]["codec"]["name"]
    try:
        calibration = decode_calibration(contents, shape["rows"] * shape["cols"] + shape["class_token"], shape["dim"])
        if codec == "klt" and calibration.basis is None:
            raise ChunkError("the basis, which the klt codec needs, is missing")
    except ChunkError as error:
        raise _damage(str(error), path, artifact.root) from None
    return calibration


def decode_calibration(contents: Mapping[str, bytes], tokens: int, dim: int) -> Calibration:
    """A calibration from the bytes of the files of its Zarr group, by path in it.

    Args:
        tokens: T, tokens of a view. dim: D, their dimensions.

    Raises:
        ChunkError: an array is missing, or does not have these dimensions.
    """

    def array(name: str, *shape: int) -> Tensor:
        chunk = f"{name}/c/" + "/".join("0" for _ in shape)
        if chunk not in contents:
            raise ChunkError(f"{name} is missing")
        if len(contents[chunk]) != 4 * int(np.prod(shape)) + 4:
            raise ChunkError(f"{name} does not have the shape {shape}")
        values = decode_chunk(contents[chunk], shape, "<f4", level=0)
        if not np.isfinite(values).all():
            raise ChunkError(f"{name} has values that are not finite")
        return torch.from_numpy(values.copy())

    mean = array("mean", dim)
    if "basis/c/0/0" not in contents:
        return Calibration(mean)
    step = float(array("step", 1)[0])
    if step <= 0:
        raise ChunkError("the step is not positive")
    more: dict[str, Any] = {}
    if f"{TOKEN_BASIS}/c/0/0" in contents:
        more = {"token_basis": array(TOKEN_BASIS, tokens, tokens), "spread": array("spread", tokens, dim)}
    return Calibration(mean, array("basis", dim, dim), step, **more)


def _damage(what: str, where: object, root: Path) -> DamageError:
    return DamageError(
        f"the set's calibration, without which no latent can be decoded, is damaged: {what}",
        where=where,
        fix=rebuild_fix(root),
    )
