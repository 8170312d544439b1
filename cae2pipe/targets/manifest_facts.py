"""The manifest entries of a target set about its teacher and its codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cae2pipe.artifacts.manifest_values import TeacherEntry
from cae2pipe.targets.calibration import Fidelity, one_thread
from cae2pipe.targets.encoding import encode_group
from cae2pipe.targets.groups import Group, Groups
from cae2pipe.targets.store_layout import PATCHES
from cae2pipe.targets.store_writing import pack_block, packed_bytes
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def teacher_facts(teacher: Teacher, output: TeacherOutput) -> TeacherEntry:
    """What readers of a set must know about its teacher, given one of its outputs."""
    info = teacher.info
    entry: TeacherEntry = {
        "name": info.name,
        "dim": info.dim,
        "rows": info.rows,
        "cols": info.cols,
        "class_token": info.class_token,
        "attention": output.attention is not None,
    }
    if info.summary is not None:
        entry["summary"] = info.summary
    if info.layers:
        entry["layers"] = sorted(info.layers)
    return entry


def codec_facts(groups: Groups, fidelity: Mapping[str, Fidelity]) -> dict[str, Any]:
    """The fidelity that calibration reached on held-out images, by group: of the patches, and of ``groups`` besides."""
    entries = {
        name: {"held_out_fidelity": asdict(fidelity[name]), "step": group.calibration.step}
        for name, group in groups.items()
    }
    patches = entries.pop(PATCHES)
    return {**patches, "groups": entries} if entries else patches


def expect_bytes(facts: dict[str, Any], groups: Groups, outputs: Sequence[TeacherOutput], *, pixel_bytes: int) -> None:
    """Add to ``codec_facts`` the expected bytes: of a view's latents, and of the pixels of a view, or of an image where
    views are replayed.

    Args:
        outputs: the teacher's, of the calibration sample, on the CPU.
        pixel_bytes: of all JPEGs of the sample.
    """
    samples = sum(len(output.tokens) for output in outputs)
    with one_thread():  # as when blocks are encoded
        latents = {name: sum(packed_output(output, group) for output in outputs) for name, group in groups.items()}
    facts["expected_bytes"] = {"latents": sum(latents.values()) // samples, "pixels": pixel_bytes // samples}
    for name, entry in facts.get("groups", {}).items():
        entry["bytes"] = latents[name] // samples


def packed_output(output: TeacherOutput, group: Group) -> int:
    """Bytes of a group of a block."""
    arrays, _, _ = encode_group(output, group)
    return packed_bytes(pack_block(group.layout, arrays))
