"""Where a student's first weights come from, if not from random numbers: ``model.init``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.encoders import FrozenTeacher, Student, display_name, load_encoder
from cae2pipe.methods.method import Method
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.models.initial_weights import encoder_weights
from cae2pipe.teachers.weights import weights_digest


@dataclass(frozen=True)
class InitialWeights:
    """``name``: of the encoder, without its folders. ``digest``: SHA-256 over the encoder's weights, whatever file they
    came from, and over the mean and std of its pixels where they are not the student's. ``state``, ``notes``: as in
    ``EncoderWeights``."""

    name: str
    digest: str
    state: dict[str, Tensor]
    notes: list[str]

    def apply(self, method: Method) -> None:
        """Set the weights of a method's encoder; what they lack, and the method's other modules, keep theirs."""
        own = method.encoder.state_dict()
        with torch.no_grad():
            for name, tensor in self.state.items():
                own[name].copy_(tensor)


def initial_weights(settings: ModelSettings) -> InitialWeights | None:
    """The weights that ``model.init`` names, on the CPU; None without it.

    Raises:
        SettingsError: they do not fit the student. SourceError, ManifestError, TeacherError, DamageError: there are no
        such weights, or they cannot be read.
    """
    if settings.init is None:
        return None
    spec = settings.init
    if spec.startswith("random:"):
        raise SettingsError(
            "random: names no weights", where=f"model.init {spec}", fix="omit it: students start from random weights"
        )
    encoder = load_encoder(spec, 0, torch.device("cpu"))
    if isinstance(encoder, Student):
        model, normalise = encoder.model, encoder.normalise
    else:
        assert isinstance(encoder, FrozenTeacher)
        teacher = encoder.teacher.unwrapped
        model, normalise = getattr(teacher, "model", teacher), teacher.normalise
    if not isinstance(model, nn.Module):
        raise SettingsError(
            "the student cannot continue from this model: it is not one of timm's",
            where=f"model.init {spec}",
            fix="give a plain ViT, such as timm:vit_base_patch16_clip_224.openai",
        )
    name = display_name(spec)
    weights = encoder_weights(model, settings, mean=normalise.mean, std=normalise.std, where=name)
    digest, pixels = weights_digest(model), (normalise.mean, normalise.std)
    if pixels != (PIXEL_MEAN, PIXEL_STD):
        digest = fingerprint([digest, *map(list, pixels)])
    return InitialWeights(name, digest, weights.state, weights.notes)
