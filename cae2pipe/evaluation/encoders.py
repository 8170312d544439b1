"""From the name of an encoder, as the user gives it, to a function of pixels.

runs/base                        a run of `cae2pipe pretrain`, or any folder with encoder.safetensors and config.json
runs/base/encoder.safetensors    the exported file, with config.json in the same folder
random:runs/base, random:tiny    the student of a run or of a pretraining preset with random weights
random:NAME                      a timm model with random weights
caev2_base.pth                   an encoder released by the authors of CAE or CAE v2
timm:NAME, timm:NAME@FILE        a model of timm, with the hub's weights or a local file's
open_clip:NAME/TAG, ...@FILE     a vision tower of open_clip, with the hub's weights or a local file's
hf-hub:ORG/NAME, local-dir:PATH  a model that a hub repository or a folder describes, as timm writes it
teacher:clip-b16[@FILE]          a teacher preset, or a YAML file of extract-targets; any of the four above
targets, teacher:targets[@FILE]  the teacher of a target set; a local file of weights must be named again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact, TargetsArtifact, check_files, is_artifact
from cae2pipe.artifacts.digest import fingerprint, sha256_file
from cae2pipe.artifacts.json_files import read_json
from cae2pipe.config.base import build_recorded, fingerprinted, load, preset_names, section_of
from cae2pipe.config.pretrain import LossSettings, ModelSettings, PretrainSettings
from cae2pipe.errors import ManifestError, SourceError, TeacherError
from cae2pipe.images.normalise import Normalise
from cae2pipe.models.description import FIX, TimmConfig, read_description
from cae2pipe.models.export import CONFIG, WEIGHTS
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.teachers.hub import local_dir
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.teachers.spelling import LIBRARIES, teacher_settings
from cae2pipe.teachers.weights import load_strictly, read_weights

KINDS = ("random", "teacher", *LIBRARIES)
FORMS = (
    "a run folder, an encoder.safetensors, a released .pth, random:RUN, random:PRESET, random:NAME, timm:NAME, "
    "timm:NAME@FILE, open_clip:NAME/TAG, open_clip:NAME@FILE, hf-hub:ORG/NAME, local-dir:PATH, "
    "teacher:PRESET, teacher:FILE.yaml or a target set"
)


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch: class_token (B, D) or None, and the patch tokens (B, P, D), float32."""

    class_token: Tensor | None
    patches: Tensor

    def together(self) -> Tensor:
        """All tokens (B, T, D), the class token first."""
        if self.class_token is None:
            return self.patches
        return torch.cat([self.class_token.unsqueeze(1), self.patches], dim=1)


@dataclass(frozen=True)
class Features:
    """Features of a batch: class_token (B, D) or None, and the mean of the patch tokens (B, D), float32."""

    class_token: Tensor | None
    mean: Tensor


class FrozenEncoder(ABC):
    """An encoder to be scored. ``trained_class_token``: whether its class token had a loss.

    ``identity`` holds plain values that the scores depend on; ``image_size`` is in pixels; ``resizes``: whether it
    resizes images of another size to its own. ``heads``: of a student's attention; None: not known.
    """

    identity: dict[str, Any]
    heads: int | None = None
    image_size: int
    trained_class_token: bool
    has_class_token: bool
    resizes: bool

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tokens:
        """Tokens of pixels, uint8 (B, 3, S, S) on the encoder's device."""

    def __call__(self, pixels: Tensor) -> Features:
        """Features of pixels, which are as in ``tokens``."""
        tokens = self.tokens(pixels)
        return Features(tokens.class_token, tokens.patches.mean(dim=1))


class Student(FrozenEncoder):
    """An exported student, or another vision transformer of timm. Mean and std are from its configuration.

    ``ours``: whether it was trained by this pipeline or CAE's authors, or is such a model with random weights. On CUDA
    the forward pass uses bfloat16 autocast unless ``precision`` is fp32.
    """

    resizes = False

    def __init__(
        self,
        model: Any,
        identity: dict[str, Any],
        trained_class_token: bool,
        *,
        device: torch.device,
        precision: str = "fp32",
        ours: bool = True,
    ):
        if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
            raise SourceError("this is not a vision transformer", where=type(model).__name__, fix=f"give {FORMS}")
        self.model = model.to(device).eval().requires_grad_(False)
        self.identity = identity if precision == "fp32" else {**identity, "precision": precision}
        self.bf16 = precision == "bf16"
        self.ours = ours
        counts = (getattr(module, "num_heads", None) for module in model.modules())
        self.heads = next((count for count in counts if isinstance(count, int)), None)
        config = model.pretrained_cfg
        self.image_size = (model.patch_embed.img_size or config["input_size"][1:])[-1]
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.trained_class_token = trained_class_token and self.has_class_token
        self.normalise = Normalise(config["mean"], config["std"], device)

    @torch.inference_mode()
    def tokens(self, pixels: Tensor) -> Tokens:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self.model.forward_features(self.normalise(pixels)).float()
        class_token = tokens[:, 0] if self.has_class_token else None
        return Tokens(class_token, tokens[:, self.model.num_prefix_tokens :])


class FrozenTeacher(FrozenEncoder):
    """A teacher, or any model that can be one: its tokens are those that would be targets."""

    resizes = True

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.identity = {"teacher": teacher.info.identity()}
        self.image_size = teacher.info.image_size
        self.has_class_token = self.trained_class_token = teacher.info.class_token

    def tokens(self, pixels: Tensor) -> Tokens:
        tokens = self.teacher(pixels).tokens
        if not self.has_class_token:
            return Tokens(None, tokens)
        return Tokens(tokens[:, 0], tokens[:, 1:])


def display_name(spec: str) -> str:
    """An encoder's name in results: ``spec`` without its folders, so that no manifest contains local paths."""
    form, colon, rest = spec.partition(":")
    if colon and form in KINDS:
        name, at, file = rest.partition("@")
        return f"{form}:{Path(name).name}{at}{Path(file).name}"
    path = Path(spec).resolve()
    return path.parent.name if path.name == WEIGHTS else path.name


def load_encoder(spec: str, seed: int, device: torch.device, *, precision: str = "fp32") -> FrozenEncoder:
    """The encoder that ``spec`` names, in one of the forms above. ``seed`` is for ``random:``. ``precision`` (fp32 or
    bf16) is for students; teachers use their own.

    Raises:
        SourceError: there is no such encoder. ManifestError: a run is not finished. DamageError: a run's files have
        changed. TeacherError: weights are missing or do not fit. MismatchError: these are not the weights that made a
        target set.
    """
    form, colon, rest = spec.partition(":")
    if not colon or form not in KINDS:
        if is_artifact(Path(spec), "targets"):
            return frozen_teacher("teacher", spec, device)
        return trained_student(Path(spec), device, precision)
    if not rest.partition("@")[0]:
        raise SourceError(f"{form}: must be followed by a name", where=spec, fix=f"give {FORMS}")
    if form == "random":
        return random_student(rest, seed, device, precision=precision)
    return frozen_teacher(form, rest if form == "teacher" else spec, device)


def trained_student(path: Path, device: torch.device, precision: str) -> Student:
    """The encoder of a run folder, of an exported file or of a released checkpoint."""
    if path.suffix in (".pth", ".pt"):
        return released_student(path, device, precision)
    folder = path.parent if path.name == WEIGHTS else path
    if not folder.is_dir():
        raise no_student("this file is no encoder that is known" if path.exists() else "no such encoder", path)
    run = RunArtifact.open(folder) if is_artifact(folder, "run") else None
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        if run:
            raise ManifestError(
                "this run is not finished: it has no encoder yet",
                where=folder,
                fix="rerun `cae2pipe pretrain` with the same arguments until it has finished",
            )
        raise no_student(f"this folder does not contain {WEIGHTS} and {CONFIG}", path)
    if run:
        for problem in check_files(run, [name for name in run.units if name == "encoder"]):
            problem.fix = "delete it, then run `cae2pipe pretrain` as before"
            raise problem
    model, config = build_exported(folder / CONFIG, (folder / WEIGHTS).stat().st_size)
    load_exported(model, folder / WEIGHTS)
    class_token = class_token_trained(run) if run else True
    digests = {"sha256": sha256_file(folder / WEIGHTS), "config": fingerprint(config)}
    return Student(model, digests, class_token, device=device, precision=precision)


def no_student(what: str, path: Path) -> SourceError:
    """The error for a path that is no student. timm's folders, such as those of `export`, have a prefix."""
    folder = timm_folder(path)
    return SourceError(what, where=path, fix=f"give {local_dir(folder) if folder else FORMS}")


def timm_folder(path: Path) -> Path | None:
    """The folder of timm that ``path`` is, or is the weights of; None if there is none."""
    folder = path if path.is_dir() else path.parent
    if not all((folder / name).is_file() for name in ("model.safetensors", CONFIG)):
        return None
    with suppress(SourceError, OSError):
        config = read_json(folder / CONFIG, fix="", error=SourceError)
        return folder if isinstance(config, dict) and "architecture" in config else None
    return None


def class_token_trained(run: RunArtifact) -> bool:
    """Whether a run's class token had a loss; pixel targets have none."""
    loss = build_recorded(LossSettings, section_of(run.identity["settings"], "loss", run.root), where=run.root)
    teacher = run.facts["teacher"]
    return trains_class_token(loss, teacher["class_token"], summary=teacher.get("summary") is not None)


def trains_class_token(loss: LossSettings, teacher_has_one: bool, *, summary: bool) -> bool:
    """Whether a student's class token has a loss: from the teacher's, or from its summary, if the set has one."""
    return (teacher_has_one and loss.aligns_class_token) or loss.aligns_summary(teacher_has_one, stored=summary)


def released_student(path: Path, device: torch.device, precision: str) -> Student:
    """The encoder of a checkpoint released by CAE's authors."""
    from cae2pipe.models.export import timm_config, timm_state
    from cae2pipe.models.released import load_released

    if not path.is_file():
        raise SourceError("no such encoder", where=path, fix=f"give {FORMS}")
    try:
        state = read_weights(path)
    except TeacherError as error:
        raise SourceError(error.what, where=path, fix=error.fix) from None
    encoder = load_released(state, path)
    model = build_vit(timm_config(encoder))
    model.load_state_dict(timm_state(encoder))
    return Student(model, {"sha256": sha256_file(path)}, True, device=device, precision=precision)


def build_exported(path: Path, weights: int) -> tuple[Any, TimmConfig]:
    """The model that a ``config.json`` describes, and the config. ``weights``: bytes of the weights file.

    timm's own ``local-dir:`` would prefer a ``model.safetensors`` in the same folder to the file whose digest we take.

    Raises:
        SourceError: it does not describe a timm model.
    """
    config = read_description(path, weights)
    try:
        return build_vit(config), config
    except Exception as error:  # timm raises many types
        reraise_exhaustion(error)
        raise SourceError(f"this does not describe a timm model: {error}", where=path, fix=FIX) from None


def build_vit(config: TimmConfig) -> Any:
    """timm's model with the architecture of an exported ``config.json``."""
    import timm

    if not timm.is_model(config["architecture"]):
        raise ValueError(f"unknown architecture {config['architecture']!r}")
    return timm.create_model(
        config["architecture"],
        pretrained=False,
        num_classes=0,
        pretrained_cfg_overlay=config["pretrained_cfg"],
        **config.get("model_args", {}),
    )


def load_exported(model: Any, path: Path) -> None:
    """Load exported weights, all of which must fit (SourceError)."""
    try:
        load_strictly(model, read_weights(path), where=path)
    except TeacherError as error:
        raise SourceError(error.what, where=path, fix=f"use the {WEIGHTS} that belongs to the {CONFIG}") from None


def random_student(name: str, seed: int, device: torch.device, *, precision: str) -> Student:
    """The student of a run or of a preset with random weights, or a timm model with timm's.

    A run's weights are random even if it started from others (``model.init``): those are an encoder of their own.
    """
    import timm

    from cae2pipe.models.encoder import build_encoder
    from cae2pipe.models.export import timm_config, timm_state

    class_token = True
    if is_artifact(Path(name), "run"):
        artifact = RunArtifact.open(Path(name))
        settings = build_recorded(ModelSettings, section_of(artifact.identity["settings"], "model", name), where=name)
        class_token = class_token_trained(artifact)
    elif Path(name).is_dir():
        raise SourceError("this folder is not a run", where=name, fix=f"give {FORMS}")
    elif name not in preset_names("pretrain") and timm.is_model(name):
        torch.manual_seed(keyed_seed("random", seed))
        model = timm.create_model(name, pretrained=False, num_classes=0)
        return Student(
            model, {"random": {"timm": name, "seed": seed}}, class_token, device=device, precision=precision, ours=False
        )
    else:
        settings = load(PretrainSettings, "pretrain", name).model
    torch.manual_seed(keyed_seed("random", seed))
    encoder = build_encoder(settings)
    model = build_vit(timm_config(encoder))
    model.load_state_dict(timm_state(encoder))
    return Student(
        model,
        {"random": {"model": fingerprinted(settings), "seed": seed}},
        class_token,
        device=device,
        precision=precision,
    )


def frozen_teacher(form: str, spelling: str, device: torch.device) -> FrozenTeacher:
    """A teacher as `cae2pipe.teachers.spelling` writes it or, in the form ``teacher``, that of a target set, with
    ``@FILE`` for local weights."""
    from cae2pipe.teachers.load import load_teacher, set_teacher

    name, _, file = spelling.partition("@")
    if form == "teacher" and is_artifact(Path(name), "targets"):
        return FrozenTeacher(
            set_teacher(
                TargetsArtifact.open(Path(name)), Path(file) if file else None, device, option=f"teacher:{name}@FILE"
            )
        )
    try:
        return FrozenTeacher(load_teacher(teacher_settings(spelling), device))
    except TeacherError as error:
        if form == "teacher" or "--set" not in (error.fix or ""):
            raise
        # This form has no settings.
        fix = f"check the name, or use {form}:NAME@FILE, or teacher:FILE.yaml with all teacher settings"
        raise TeacherError(error.what, where=error.where, fix=fix) from None
