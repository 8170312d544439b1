"""The arithmetic of a teacher on a device: what its authors published for its family."""

from __future__ import annotations

import re

import torch

from cae2pipe.config.extract import TeacherSettings

FAMILIES = (
    # DINOv3's configuration (compute_precision.param_dtype: bf16); EUPE's code is built on DINOv3's.
    (r"dinov3|eupe", "bf16"),
    # RADIO's README runs its models under torch.autocast("cuda", dtype=torch.bfloat16).
    (r"_radio_", "bf16"),
    # Weights are published in fp32, for code that computes in bf16 on TPUs. Activations of so400m's tower exceed fp16's
    # range (github.com/Blaizzy/mlx-vlm/issues/1163).
    (r"siglip", "bf16"),
    # EVA-CLIP's table of models: all were trained in fp16, but the largest in bf16.
    (r"eva02_enormous\w*_clip_\d+\.laion2b_plus|EVA02-E-14-plus", "bf16"),
)
"""What the architectures and tags of a family contain, and its published precision. All others are fp16: OpenAI's CLIP
converts its weights to it on a GPU, DINOv2 was trained in it (teacher.backbone.mixed_precision), EVA-CLIP, PE and
MobileCLIP show their use under CUDA's autocast, which is fp16."""


def published_precision(settings: TeacherSettings) -> str:
    """bf16 or fp16: that of the model's family, by its architecture and tag; names of folders and repositories say
    nothing.

    Raises:
        TeacherError: nothing describes the model, or its hub repository is not cached.
    """
    name = _open_clip_name(settings) if settings.kind == "open_clip" else _timm_name(settings)
    return next((precision for pattern, precision in FAMILIES if re.search(pattern, name, re.IGNORECASE)), "fp16")


def _timm_name(settings: TeacherSettings) -> str:
    from cae2pipe.teachers.timm_source import source_of

    source = source_of(settings)
    return f"{source.name}.{source.tag}" if source.tag else source.name


def _open_clip_name(settings: TeacherSettings) -> str:
    """The library's name and tag, if it has the model, and timm's name of its trunk."""
    from open_clip import list_models

    from cae2pipe.teachers.open_clip_towers import tower_shape

    named = settings.vision_cfg is None and settings.name in list_models()
    tag = f".{settings.pretrained}" if settings.pretrained else ""
    trunk = tower_shape(settings)["vision_cfg"].get("timm_model_name") or ""
    return f"{settings.name}{tag} {trunk}" if named else str(trunk)


def resolve_precision(settings: TeacherSettings, device: torch.device, begun: str | None = None) -> str:
    """The precision of a teacher on a device: fp32, bf16 or fp16.

    ``auto`` is fp32 on a CPU; on CUDA that of an existing set (``begun``), else the published one. Devices that only
    emulate bf16, slowly, use fp32 for it.
    """
    if settings.precision != "auto":
        return settings.precision
    if device.type != "cuda":
        return "fp32"
    precision = begun if begun in ("fp16", "bf16") else published_precision(settings)
    emulated = precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if emulated else precision
