"""The manifest entries of a target set about its teacher and its codec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cae2pipe.artifacts.manifest_values import TeacherEntry
from cae2pipe.targets.calibration import Calibration, Fidelity, one_thread
from cae2pipe.targets.encoding import encode_tokens
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.targets.store_writing import pack_block, packed_bytes
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def teacher_facts(teacher: Teacher, output: TeacherOutput) -> TeacherEntry:
    """What readers of a set must know about its teacher, given one of its outputs."""
    info = teacher.info
    return {
        "name": info.name,
        "dim": info.dim,
        "rows": info.rows,
        "cols": info.cols,
        "class_token": info.class_token,
        "attention": output.attention is not None,
    }


def codec_facts(
    outputs: list[TeacherOutput], layout: StoreLayout, calibration: Calibration, *, fidelity: Fidelity, pixel_bytes: int
) -> dict[str, Any]:
    """The fidelity that calibration reached, and the expected bytes: of a view's latents, and of the pixels of a view,
    or of an image where views are replayed.

    Args:
        outputs: the teacher's, of the calibration sample, on the CPU.
        fidelity: measured on held-out images.
        pixel_bytes: of all JPEGs of the sample.
    """
    samples = sum(len(output.tokens) for output in outputs)
    latents = 0
    with one_thread():  # as when blocks are encoded
        for output in outputs:
            arrays, _, _ = encode_tokens(output.tokens, output.attention, layout, calibration=calibration)
            latents += packed_bytes(pack_block(layout, arrays))
    return {
        "held_out_fidelity": asdict(fidelity),
        "step": calibration.step,
        "expected_bytes": {"latents": latents // samples, "pixels": pixel_bytes // samples},
    }
