"""Training on labels starts from the LayerScale that pretraining has learnt, wherever the encoder comes from.

The reference is a plain copy of what the authors' code computes: a ViT with gammas, whose mean patch passes the final
norm and a classifier, and AdamW with layer-wise rates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.config.evaluate import FinetuneSettings
from cae2pipe.evaluation.backbone import prepared_encoder
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.evaluation.finetune import FinetuneLearner, build_classifier
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD, export_encoder
from cae2pipe.runtime.world import World
from cae2pipe.supervised.schedule import Chunk, full_batches

WIDTH, DEPTH, HEADS, CLASSES, STEPS = 192, 2, 12, 3, 8
LEARNT = ("exported folder", "exported file", "released", "run")
CPU = torch.device("cpu")
Weights = dict[str, Tensor]


@pytest.fixture(params=LEARNT)
def learnt(request, tmp_path: Path, trained_run: Callable[..., Path]) -> tuple[str, Weights]:
    """What names an encoder, and its weights under our names; each gamma has moved away from 0.1."""
    if request.param == "run":
        run = trained_run(
            model={"width": WIDTH, "heads": HEADS}, optimizer={"lr": 0.05, "scale_lr": False, "warmup_epochs": 0}
        )
        newest = max((run / "checkpoints").iterdir())
        state = torch.load(newest, weights_only=True)["model"]
        return str(run), {n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")}
    torch.manual_seed(0)
    encoder = Encoder(width=WIDTH, depth=DEPTH, heads=HEADS, image_size=32, patch_size=8)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(torch.randn(WIDTH).exp())
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if request.param == "released":
        renamed = (("patch_embed.", "patch_embed.proj."), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
        named = {}
        for name, tensor in state.items():
            for ours, theirs in renamed:
                name = name.replace(ours, theirs)
            named[f"encoder.{name}"] = tensor
        torch.save({"model": named}, tmp_path / "caev2_tiny.pth")
        return str(tmp_path / "caev2_tiny.pth"), state
    export_encoder(encoder, tmp_path / "exported")
    return str(tmp_path / "exported" / ("encoder.safetensors" if request.param == "exported file" else "")), state


def gammas(state: Weights) -> Weights:
    return {name: tensor for name, tensor in state.items() if name.endswith("gamma")}


@pytest.mark.parametrize("settings", [FinetuneSettings(), SegmentSettings(), DetectSettings()])
def test_every_training_on_labels_starts_from_it(learnt, settings):
    spec, state = learnt
    network = prepared_encoder(
        load_encoder(spec, 0, CPU),
        spec,
        image_size=None,
        layer_scale=settings.layer_scale,
        drop_path=settings.drop_path,
        relative_positions=False,
    )
    found = gammas(network.model.state_dict())
    assert found.keys() == gammas(state).keys()
    for name, wanted in gammas(state).items():
        assert torch.equal(found[name], wanted)
        assert float((wanted - 0.1).abs().mean()) > 0.01


def reference_logits(w: Weights, images: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = F.conv2d(images, w["patch_embed.weight"], w["patch_embed.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for block in (f"blocks.{number}" for number in range(DEPTH)):
        bias = torch.cat([w[f"{block}.attn.q_bias"], torch.zeros(WIDTH), w[f"{block}.attn.v_bias"]])
        qkv = norm(x, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T + bias
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = ((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2) @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]
        x = x + w[f"{block}.ls1.gamma"] * y
        y = F.gelu(norm(x, f"{block}.norm2") @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"])
        x = x + w[f"{block}.ls2.gamma"] * (y @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"])
    return norm(x[:, 1:].mean(dim=1), "norm") @ w["head.weight"].T + w["head.bias"]


def reference_groups(w: Weights, settings: FinetuneSettings) -> list[dict[str, object]]:
    """Rates lr * decay^(L + 1 - i); no decay of one-dimensional parameters and of the class token."""
    groups = []
    for name, tensor in w.items():
        if name != "pos_embed":
            layer = DEPTH + 1 if name.startswith(("norm.", "head.")) else 0
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layer
            bare = tensor.ndim <= 1 or name == "cls_token"
            rate = settings.lr * settings.layer_decay ** (DEPTH + 1 - layer)
            groups.append({"params": [tensor], "lr": rate, "weight_decay": 0.0 if bare else settings.weight_decay})
    return groups


def test_eight_steps_of_fine_tuning_are_those_of_a_plain_copy(learnt, tmp_path):
    spec, state = learnt
    settings = FinetuneSettings(
        lr=2e-3, min_lr=2e-3, warmup_epochs=0, epochs=STEPS, batch=4, chunk=4, mixup=0, cutmix=0, smoothing=0,
        erase=0, drop_path=0, relative_positions=False, head_scale=1,
    )  # fmt: skip
    settings = settings.model_copy(update={"batch": 1024})  # which rates refer to
    classifier = build_classifier(load_encoder(spec, 0, CPU), CLASSES, settings, spec=spec)
    w = {name: tensor.clone() for name, tensor in state.items()}
    w |= {f"head.{name}": tensor.detach().clone() for name, tensor in classifier.model.head.named_parameters()}
    for name, tensor in w.items():
        tensor.requires_grad_(name != "pos_embed")
    optimizer = torch.optim.AdamW(reference_groups(w, settings), betas=(0.9, 0.999))
    learner = FinetuneLearner(
        classifier,
        CLASSES,
        settings,
        schedule=full_batches(4, 4, 4, epochs=STEPS, seed=0),
        bf16=False,
        compiled=False,
        world=World(0, 1, CPU),
        predict=lambda scores: pytest.fail("nothing is scored"),
        root=tmp_path,
    )
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    for step in range(STEPS):
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, CLASSES, (4,), generator=generator)
        loss = F.cross_entropy(reference_logits(w, (pixels / 255 - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = learner.step([Chunk(step, 0, pixels, labels)], step, 4)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-3, atol=1e-4)
    trained, last = classifier.model.state_dict(), f"blocks.{DEPTH - 1}"
    for name in (f"{last}.ls1.gamma", f"{last}.ls2.gamma", f"{last}.mlp.fc2.weight", "blocks.0.attn.proj.weight"):
        moved = w[name].detach() - state[name]
        assert float(moved.abs().max()) > 2e-3, name
        torch.testing.assert_close(trained[name] - state[name], moved, rtol=0.05, atol=2e-4)
