"""A loss curve that no refactor may move: made-up data, no files, float32 on the CPU."""

import pytest
import torch

from cae2pipe.keyed import keyed_uniforms
from cae2pipe.loading.batches import Batch
from cae2pipe.methods.registry import build_method
from cae2pipe.models.masks import draw_mask, split_indices
from cae2pipe.targets.codecs import Fp16Codec
from cae2pipe.training.objective import Objective
from cae2pipe.training.optimizer import build_optimizer, scaled
from cae2pipe.training.parallel import World
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
    # Latents that can be learnt: of the mean colour of their patch.
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
    objective = Objective(model, settings.loss, Fp16Codec(), torch.zeros(DIM), True, False).train()
    optimizer = build_optimizer(model, settings.optimizer)
    world = World(0, 1, torch.device("cpu"))
    step = Step(objective, objective, optimizer, {"tokens": 0}, cached, 1, settings.optimizer.clip, world)
    losses = []
    for number in range(STEPS):
        lr = learning_rate(number, 5, 4, *scaled(settings.optimizer, BATCH))
        losses.append(step(made_up(number, settings.masked_patches, model.drop_columns), lr).values()["loss"])
    return losses


# fmt: off
GOLDEN = {
    "paper": [
        2.008311, 1.957418, 2.05268, 1.961771, 1.956074, 1.964164, 1.914496, 1.785587, 1.921766, 1.914408,
        1.808375, 1.708228, 1.808366, 1.658811, 1.786904, 1.641618, 1.685102, 1.616843, 1.706084, 1.633297,
    ],
    "official": [
        1.013203, 0.993227, 1.016486, 0.983613, 0.975015, 0.980695, 0.946064, 0.902234, 0.928983, 0.952944,
        0.891353, 0.81441, 0.863813, 0.779, 0.853745, 0.76859, 0.793944, 0.76231, 0.801357, 0.783434,
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
