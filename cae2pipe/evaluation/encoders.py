"""From what a user calls an encoder to a function of pixels.

runs/base                        a run of `cae2pipe pretrain`, or any folder with encoder.safetensors and config.json
runs/base/encoder.safetensors    the exported file, config.json beside it
random:runs/base, random:tiny    the student of a run or of a pretraining preset as it is before training
timm:NAME, timm:NAME@FILE        a model of timm, with the hub's weights or a local file's
teacher:clip-b16[@FILE]          a teacher preset
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.box import is_box, open_box
from cae2pipe.artifacts.digest import sha256_file
from cae2pipe.config.base import identity, load
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import ManifestError, SourceError
from cae2pipe.keyed import keyed_seed
from cae2pipe.models.export import CONFIG, PIXEL_MEAN, PIXEL_STD, WEIGHTS
from cae2pipe.teachers.protocol import Teacher

FORMS = "a run folder, an encoder.safetensors, random:RUN, random:PRESET, timm:NAME, timm:NAME@FILE or teacher:PRESET"


@dataclass(frozen=True)
class Features:
    """Of a batch: class_token (B, D) or None, and the mean of the patch tokens (B, D), float32."""

    class_token: Tensor | None
    mean: Tensor


class FrozenEncoder(ABC):
    """An encoder to be scored. ``trained_class_token`` says whether training reached its class token.

    ``identity`` holds plain values that the scores depend on; ``image_size`` is in pixels.
    """

    identity: dict[str, Any]
    image_size: int
    trained_class_token: bool
    has_class_token: bool

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Features:
        """Features of pixels, uint8 (B, 3, S, S) on the encoder's device."""


class Student(FrozenEncoder):
    """An exported student, or one with timm's architecture."""

    has_class_token = True

    def __init__(self, model: Any, identity: dict[str, Any], trained_class_token: bool, device: torch.device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.identity = identity
        self.image_size = model.pretrained_cfg["input_size"][-1]
        self.trained_class_token = trained_class_token
        self._mean = torch.tensor(PIXEL_MEAN, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(PIXEL_STD, device=device).view(1, 3, 1, 1) * 255

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        tokens = self.model.forward_features((pixels.float() - self._mean) / self._std).float()
        return Features(tokens[:, 0], tokens[:, 1:].mean(dim=1))


class FrozenTeacher(FrozenEncoder):
    """A teacher, or any model that teachers can be: its tokens as they would be targets."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.identity = {"teacher": teacher.info.identity()}
        self.image_size = teacher.info.image_size
        self.has_class_token = self.trained_class_token = teacher.info.class_token

    def __call__(self, pixels: Tensor) -> Features:
        tokens = self.teacher(pixels).tokens
        if not self.has_class_token:
            return Features(None, tokens.mean(dim=1))
        return Features(tokens[:, 0], tokens[:, 1:].mean(dim=1))


def load_encoder(spec: str, seed: int, device: torch.device) -> FrozenEncoder:
    """The encoder that ``spec`` names, in one of the forms above. ``seed`` is for ``random:``.

    Raises:
        SourceError: no such thing. ManifestError: a run that is not finished. TeacherError: weights that are missing.
    """
    form, colon, rest = spec.partition(":")
    if colon and form == "random":
        return random_student(rest, seed, device)
    if colon and form in ("timm", "teacher"):
        return frozen_teacher(form, rest, device)
    return trained_student(Path(spec), device)


def trained_student(path: Path, device: torch.device) -> Student:
    """The encoder of a run folder or of an exported file."""
    import timm

    folder = path.parent if path.name == WEIGHTS else path
    if not folder.is_dir():
        raise SourceError("there is no such encoder", where=path, fix=f"give {FORMS}")
    is_run = is_box(folder, "run")
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        if is_run:
            raise ManifestError(
                "this run is not finished: it has no encoder yet",
                where=folder,
                fix="run `cae2pipe pretrain` with the same arguments as before",
            )
        raise SourceError(f"this folder holds no {WEIGHTS} with its {CONFIG}", where=folder, fix=f"give {FORMS}")
    class_token = bool(open_box(folder).facts["teacher"]["class_token"]) if is_run else True
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True, num_classes=0)
    return Student(model, {"sha256": sha256_file(folder / WEIGHTS)}, class_token, device)


def random_student(name: str, seed: int, device: torch.device) -> Student:
    """The student of a run, or of a preset, as it is before training."""
    import timm

    from cae2pipe.models.encoder import Encoder
    from cae2pipe.models.export import timm_config, timm_state

    class_token = True
    if is_box(Path(name), "run"):
        box = open_box(Path(name))
        settings = ModelSettings.model_validate(box.identity["settings"]["model"])
        class_token = bool(box.facts["teacher"]["class_token"])
    else:
        settings = load(PretrainSettings, "pretrain", name).model
    torch.manual_seed(keyed_seed("random", seed))
    encoder = Encoder(
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        layer_scale=settings.layer_scale,
    )
    config = timm_config(encoder)
    model = timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=0,
        pretrained_cfg_overlay=config["pretrained_cfg"],
        **config["model_args"],
    )
    model.load_state_dict(timm_state(encoder))
    return Student(model, {"random": {"model": identity(settings), "seed": seed}}, class_token, device)


def frozen_teacher(form: str, name: str, device: torch.device) -> FrozenTeacher:
    """``timm:NAME`` or ``teacher:PRESET``, each with ``@FILE`` for local weights."""
    from cae2pipe.teachers.load import load_teacher

    name, _, file = name.partition("@")
    if form == "timm":
        settings = TeacherSettings(kind="timm", name=name)
    else:
        settings = load(ExtractSettings, "extract", name).teacher
    if file:
        settings = settings.model_copy(update={"weights": Path(file)})
    return FrozenTeacher(load_teacher(settings, device))
