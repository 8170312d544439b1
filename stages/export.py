"""Export an encoder to a folder in another library's layout, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact, is_artifact, open_artifact
from cae2pipe.artifacts.atomic import remove_debris, write_bytes
from cae2pipe.artifacts.tensors import write_safetensors
from cae2pipe.comparison.scores import collect
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.evaluation.encoders import Student, display_name, load_encoder, timm_folder
from cae2pipe.models.export import WEIGHTS
from cae2pipe.models.formats import FORMATS, TABLE, ExportLayout, Shape
from cae2pipe.reporting.model_card import model_card
from cae2pipe.teachers.hub import local_dir

CARD = "README.md"


def export(spec: str, out: Path, kind: str, *, scores: list[Path]) -> list[Path]:
    """Write an encoder's weights, description and model card into the folder ``out``.

    Args:
        spec: a run folder, an exported file or a released checkpoint, as for ``load_encoder``.
        out: the output folder; those of an earlier export of the same encoder are replaced.
        kind: one of ``FORMATS``.
        scores: folders with evaluations to show on the card.

    Raises:
        SourceError: there is no such encoder, or the folder holds something else. SettingsError: the format is unknown,
        or the encoder is from another library. ManifestError: the run is not finished. DamageError: its files have
        changed.
    """
    if kind not in FORMATS:
        raise SettingsError(f"unknown format {kind!r}", where="--format", fix=f"use one of {', '.join(FORMATS)}")
    if is_artifact(Path(spec)) and not is_artifact(Path(spec), "run"):
        raise SourceError(
            f"this is a folder of kind {open_artifact(Path(spec)).kind!r}, not a run",
            where=spec,
            fix="give a folder made by `cae2pipe pretrain`",
        )
    if folder := timm_folder(Path(spec)):
        raise SourceError(
            "this is an exported encoder", where=spec, fix=f"use {local_dir(folder)} as it is, or export its run again"
        )
    encoder = load_encoder(spec, 0, torch.device("cpu"))
    if not isinstance(encoder, Student) or not encoder.ours:
        raise SettingsError(
            "this encoder comes from another library",
            where=spec,
            fix="use a run folder, an encoder.safetensors or a released .pth",
        )
    model = encoder.model
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    positions = {"relative": f"blocks.0.{TABLE}" in state, "rotary": getattr(model, "rope", None) is not None}
    if kind != "timm" and (more := next((name for name, has in positions.items() if has), None)):
        raise SettingsError(
            f"the format {kind} has no {more} positions, and this encoder was trained with them",
            where="--format",
            fix="use --format timm",
        )
    shape = Shape(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=model.blocks[0].attn.num_heads,
        mean=encoder.normalise.mean,
        std=encoder.normalise.std,
        layer_scale="blocks.0.ls1.gamma" in state or "blocks.0.gamma_1" in state,
        relative_positions=positions["relative"],
        rotary_positions=positions["rotary"],
    )
    layout = FORMATS[kind](state, shape)
    folder = Path(spec).parent if Path(spec).name == WEIGHTS else Path(spec)
    run = RunArtifact.open(folder) if is_artifact(folder, "run") else None
    card = model_card(
        display_name(spec),
        layout,
        shape,
        run=run,
        scores=collect(scores) if scores else [],
        class_token=encoder.trained_class_token,
    )
    weights = {name: tensor.contiguous() for name, tensor in layout.state.items()}
    refuse_others(out, layout, weights)
    out.mkdir(parents=True, exist_ok=True)
    remove_debris(out)
    write_safetensors(out / layout.weights, weights, layout.metadata)
    for name, content in layout.files.items():
        write_bytes(out / name, (json.dumps(content, indent=1) + "\n").encode())
    write_bytes(out / CARD, card.encode())
    return [out / name for name in (layout.weights, *layout.files, CARD)]


def refuse_others(out: Path, layout: ExportLayout, weights: Mapping[str, Tensor]) -> None:
    """Raise SourceError if a folder holds anything but an earlier export of the same encoder and format."""
    ours = {layout.weights, *layout.files, CARD}
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(name for name in names - ours if not name.startswith("."))
    if foreign or (names and layout.weights not in names):
        raise SourceError(
            f"the folder is not empty (it contains {(foreign or sorted(names))[0]!r})",
            where=out,
            fix="use a new or an empty folder",
        )
    if names and not same_weights(out / layout.weights, weights):
        raise SourceError(
            "this folder holds an export of another encoder, or in another format",
            where=out,
            fix="use a new or an empty folder",
        )


def same_weights(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a file of safetensors holds exactly these tensors. A damaged one does not."""
    try:
        there = load_file(path)
    except SafetensorError:
        return False
    return there.keys() == weights.keys() and all(torch.equal(there[name], weights[name]) for name in weights)
