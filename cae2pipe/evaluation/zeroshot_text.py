"""The text tower of an open_clip model, and embeddings of classes from prompts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.evaluate import PromptSet
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import SourceError, TeacherError
from cae2pipe.runtime.device import exact_float32
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.progress import Report
from cae2pipe.teachers.hub import pretrained_file
from cae2pipe.teachers.open_clip import check_activation
from cae2pipe.teachers.open_clip_towers import assumed, tower_shape
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest

FORM = "open_clip:NAME/TAG, or open_clip:NAME@FILE with local weights"
OTHERWISE = "compute the class embeddings with open_clip, and give them as --classes FILE.safetensors"
ASSUMED = (
    "text tower: the activation of these weights is assumed, {} QuickGELU as in open_clip's model of that name: "
    "neither a configuration next to the file nor a tag says otherwise"
)
BATCH = 256
"""Texts that pass the tower together."""


@dataclass(frozen=True)
class TextTower:
    """``encode`` of open_clip's text tower. ``name``: without folders; ``digest``: of its weights; ``width``: W;
    ``quick_gelu``: its activation, where it is not that of open_clip's model of that name; ``notes``: for the log."""

    name: str
    module: nn.Module
    tokenize: Any
    digest: str
    width: int
    quick_gelu: bool | None = None
    notes: tuple[str, ...] = ()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings (N, W) float32 of texts, on the device."""
        output = self.module.to(device)(self.tokenize(list(texts)).to(device))
        features: Tensor = output[0] if isinstance(output, tuple) else output
        return features.float()


def load_text_tower(spec: str) -> TextTower:
    """The text tower that ``spec`` names, on the CPU.

    Raises:
        SourceError: not in one of the forms, or a model without a text tower that can be built without a network.
        TeacherError: weights are missing, unsafe or do not fit.
    """
    from open_clip import get_model_config, get_pretrained_cfg, get_tokenizer, list_models
    from open_clip.model import _build_text_tower

    form, _, rest = spec.partition(":")
    model, _, file = rest.partition("@")
    name, _, tag = model.partition("/")
    if form != "open_clip" or not name:
        raise SourceError("this names no text tower of open_clip", where=f"text {spec}", fix=f"give {FORM}")
    config = get_model_config(name)
    if config is None:
        nearest = difflib.get_close_matches(name, list_models(), n=1)
        raise SourceError(
            f"open_clip has no model {name!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
            where=f"text {spec}",
            fix=f"give {FORM}",
        )
    text = config.get("text_cfg") or {}
    if not text or text.get("hf_model_name"):
        what = "is one of transformers, which open_clip downloads" if text else "does not exist"
        raise SourceError(f"the text tower of {name} {what}", where=f"text {spec}", fix=OTHERWISE)
    weights = Path(file) if file else None
    teacher = TeacherSettings(kind="open_clip", name=name, pretrained=tag or None, weights=weights)
    try:
        # As for the vision tower: a configuration next to the file says which.
        quick_gelu: bool = tower_shape(teacher)["quick_gelu"]
        check_activation(teacher, quick_gelu, get_pretrained_cfg(name, tag) if tag else {})
        path = weights or pretrained_file(teacher)
        tower = _build_text_tower(config["embed_dim"], text, quick_gelu=quick_gelu)
        load_strictly(tower, text_state(read_weights(path), tower, path), where=path)
    except TeacherError as error:
        # Those of a teacher name its settings.
        where = f"text {spec}" if str(error.where).startswith("teacher") else error.where
        raise TeacherError(error.what, where=where, fix=f"give {FORM}; or {OTHERWISE}") from None
    try:
        tokenize = get_tokenizer(name)
    except Exception as error:  # transformers and the hub's client raise many types
        reraise_exhaustion(error)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"the tokenizer of {name} cannot be made: {reason}", where=f"text {spec}", fix=OTHERWISE
        ) from None
    tower = tower.eval().requires_grad_(False)
    shown = f"open_clip:{model}{'@' if file else ''}{Path(file).name}"
    notes = (ASSUMED.format("with" if quick_gelu else "without"),) if "activation" in assumed(teacher) else ()
    other = None if quick_gelu == bool(config.get("quick_gelu", False)) else quick_gelu
    return TextTower(shown, tower, tokenize, weights_digest(tower), config["embed_dim"], other, notes)


def text_state(state: Mapping[str, Tensor], tower: nn.Module, path: Path) -> dict[str, Tensor]:
    """The text tower's part of a CLIP state, in float32. Raises TeacherError if there is none."""
    prefix = "text."
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # Models of CLIP's original layout hold it next to the visual tower.
    own = own or {name: state[name] for name in tower.state_dict() if name in state}
    if not own:
        raise TeacherError("this file has no text tower", where=path)
    return {name: tensor.float() for name, tensor in own.items()}


def prompts_of(prompts: PromptSet | tuple[str, ...]) -> tuple[str, ...]:
    """The prompts, each with ``{}`` in place of the class: open_clip's sets by name, or those that were given."""
    if isinstance(prompts, tuple):
        return prompts
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    sets = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{}") for template in sets[prompts])


def embed_classes(
    tower: TextTower,
    names: Sequence[Sequence[str]],
    prompts: Sequence[str],
    *,
    device: torch.device,
    report: Report,
) -> Tensor:
    """Class embeddings (C, W) of unit length, float32 on the CPU: the mean of the unit embeddings of every prompt with
    every name of the class."""
    report.phase("embedding the classes")
    report.total(len(names), "classes")
    rows = []
    with exact_float32(device):
        for each in names:
            texts = [prompt.replace("{}", name) for name in each for prompt in prompts]
            parts = [tower.encode(texts[low : low + BATCH], device) for low in range(0, len(texts), BATCH)]
            mean = torch.cat([F.normalize(part, dim=1) for part in parts]).mean(dim=0)
            rows.append(F.normalize(mean, dim=0).cpu())
            report.advance(1)
    return torch.stack(rows)
