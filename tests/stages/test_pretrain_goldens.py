"""A loss curve that no refactoring may change: synthetic data, no files, float32 on the CPU."""

import pytest
import torch

from cae2pipe.loading.batches import Batch
from cae2pipe.methods.registry import build_method
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.world import World
from cae2pipe.targets.codecs import Fp16Codec
from cae2pipe.training.alignment import Alignment
from cae2pipe.training.objective import Objective
from cae2pipe.training.optimizer import build_optimizer, scaled
from cae2pipe.training.schedule import learning_rate
from cae2pipe.training.step import Step, cached

BATCH, STEPS, GRID, DIM = 16, 20, 4, 16


def uniforms(*shape: int, key: tuple) -> torch.Tensor:
    count = 1
    for side in shape:
        count *= side
    return torch.from_numpy(keyed_uniforms(count, *key)).float().reshape(shape)


def made_up(step: int, masked: int, columns: int) -> Batch:
    masks = [split_indices(draw_mask("block", GRID, GRID, masked, "golden", step, row)) for row in range(BATCH)]
    pixels = (uniforms(BATCH, 3, 32, 32, key=("pixels", step)) * 256).to(torch.uint8)
    # Latents that can be learnt: functions of the mean colour of their patch.
    colours = pixels.float().unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(4, 5)).flatten(2).transpose(1, 2)
    mixing = uniforms(3, DIM, key=("mixing",)) - 0.5
    patches = torch.nn.functional.normalize((colours - 127) @ mixing, dim=-1)
    tokens = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)
    return Batch(
        epoch=step // 5,
        step=step,
        real=BATCH,
        pixels=pixels,
        jpegs=torch.zeros(0, dtype=torch.uint8),
        sizes=torch.zeros(BATCH, dtype=torch.int64),
        arrays={"tokens": torch.nn.functional.normalize(tokens, dim=-1).half()},
        weights=torch.ones(BATCH),
        visible=torch.stack([torch.from_numpy(v) for v, _ in masks]),
        masked=torch.stack([torch.from_numpy(m) for _, m in masks]),
        drop=uniforms(BATCH, columns, key=("drop", step)),
        keys=[str(row) for row in range(BATCH)],
        views=[0] * BATCH,
    )


def curve(settings) -> list[float]:
    torch.manual_seed(0)
    model = build_method("caev2", settings.model, DIM)
    teacher = Alignment(settings.loss, Fp16Codec(), mean=torch.zeros(DIM), class_token=True)
    objective = Objective(model, settings.loss, [teacher], bf16=False).train()
    optimizer = build_optimizer(model, settings.optimizer)
    world = World(0, 1, torch.device("cpu"))
    step = Step(
        objective,
        objective,
        optimizer,
        axes={"tokens": 0},
        latents=cached,
        accumulation=1,
        clip=settings.optimizer.clip,
        world=world,
    )
    losses = []
    for number in range(STEPS):
        lr = learning_rate(number, 5, 4, **scaled(settings.optimizer, BATCH)._asdict())
        losses.append(step(made_up(number, settings.masked_patches, model.drop_columns), lr).values()["loss"])
    return losses


# fmt: off
GOLDEN = {
    "paper": [
        2.037659, 2.071849, 1.980604, 1.98704, 1.980064, 1.895033, 1.876827, 1.761599, 1.86752, 1.799484,
        1.722173, 1.637076, 1.677095, 1.586686, 1.62581, 1.532528, 1.590881, 1.519427, 1.582544, 1.511794,
    ],
    "official": [
        1.031184, 1.051851, 0.993694, 0.997745, 0.989492, 0.929513, 0.923398, 0.869074, 0.897773, 0.867318,
        0.832825, 0.766689, 0.76982, 0.722306, 0.747838, 0.689044, 0.725313, 0.691486, 0.715847, 0.697531,
    ],
}
# fmt: on


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_the_loss_curve_stays(pretrain_settings, recipe):
    over = {"optimizer": {"lr": 0.25}, "data": {"batch": BATCH}}
    if recipe == "official":
        over |= {"model": {"head": "ln-fc"}, "loss": {"reduction": "one_mean"}}
        over["optimizer"] |= {"beta2": 0.999}
    assert curve(pretrain_settings(**over)) == pytest.approx(GOLDEN[recipe], rel=2e-4)
