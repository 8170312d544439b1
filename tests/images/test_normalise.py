"""One normalisation for all networks, bit for bit as in existing latents, scores and runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cae2pipe.images.normalise import Normalise
from cae2pipe.methods.losses import Prediction
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD
from cae2pipe.targets.codecs import Fp16Codec
from cae2pipe.targets.target_set import Target
from cae2pipe.teachers.protocol import Teacher, TeacherInfo, TeacherOutput
from cae2pipe.training.alignment import Alignment
from cae2pipe.training.objective import Objective
from cae2pipe.training.student import as_pixels
from cae2pipe.training.target_spec import PixelTargets, unfolded

CPU = torch.device("cpu")
PIXELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
"""Every value in every channel."""
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
OF_PIXELS = (PIXELS.float() - 255 * MEAN) / (255 * STD)
OF_SHARES = (PIXELS.float() / 255 - MEAN) / STD


def test_both_orders_are_the_same_up_to_rounding():
    assert not torch.equal(OF_PIXELS, OF_SHARES)
    torch.testing.assert_close(OF_PIXELS, OF_SHARES, rtol=1e-6, atol=1e-6)
    assert torch.equal(Normalise(PIXEL_MEAN, PIXEL_STD)(PIXELS), OF_PIXELS)
    assert torch.equal(Normalise(PIXEL_MEAN, PIXEL_STD, unit_range=True)(PIXELS), OF_SHARES)


def test_no_checkpoint_holds_it():
    assert not Normalise(PIXEL_MEAN, PIXEL_STD).state_dict()


def test_a_teacher_keeps_its_bits():
    class Sees(Teacher):
        def tokens(self, pixels: Tensor) -> TeacherOutput:
            return TeacherOutput(pixels.flatten(2), None)

    info = TeacherInfo("made up", "sees", {}, "", 256, 1, 3, False, 16, PIXEL_MEAN, PIXEL_STD, "fp32")
    assert torch.equal(Sees(info, CPU)(PIXELS).tokens, OF_PIXELS.flatten(2))


@pytest.mark.parametrize("trained", [False, True])
def test_an_evaluated_encoder_keeps_its_bits(trained, exported):
    from cae2pipe.evaluation.backbone import prepared_encoder
    from cae2pipe.evaluation.encoders import load_encoder

    encoder = load_encoder(str(exported), 0, CPU)
    seen = []
    with encoder.model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        if trained:
            network = prepared_encoder(
                encoder, str(exported), image_size=None, layer_scale=None, drop_path=0.0, relative_positions=False
            )
            network(network.normalise(PIXELS.repeat(1, 1, 2, 2)))
        else:
            encoder.tokens(PIXELS.repeat(1, 1, 2, 2))
    assert torch.equal(seen[0], OF_PIXELS.repeat(1, 1, 2, 2))


def test_a_student_in_pretraining_keeps_its_bits(pretrain_settings):
    class Sees(nn.Module):
        def forward(self, images: Tensor, visible: Tensor, masked: Tensor, drop: Tensor) -> Prediction:
            self.images = images
            tokens = torch.ones(len(images), 1, 4)
            return Prediction(tokens, tokens, tokens)

    loss = pretrain_settings().loss
    own = Alignment(loss, Fp16Codec(), mean=torch.zeros(4), class_token=True)
    objective = Objective(Sees(), loss, [own], bf16=False)
    patch = torch.zeros(2, 1, dtype=torch.int64)
    objective(PIXELS, {"raw": torch.ones(2, 3, 4)}, patch, patch + 1, patch, torch.ones(2), torch.tensor(2))
    assert torch.equal(objective.model.images, OF_SHARES)
    assert list(objective.state_dict()) == []

    pixels = PIXELS.permute(0, 2, 3, 1).numpy()
    views = [Target("", 0, -1, None, None, each, None) for each in pixels]
    assert torch.equal(as_pixels(views, CPU), OF_SHARES)


def test_pixels_as_targets_keep_their_bits():
    patches = unfolded(OF_SHARES, 2)
    wanted = nn.functional.layer_norm(patches, patches.shape[-1:], eps=1e-6)
    assert torch.equal(PixelTargets(2, CPU)(SimpleNamespace(pixels=PIXELS))["decoded"], wanted)
