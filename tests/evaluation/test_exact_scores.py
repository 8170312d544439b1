"""Neighbours and probes are computed in float32 from the start, regardless of autocast and TF32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cae2pipe.config.base import load
from cae2pipe.config.dense import DENSE
from cae2pipe.config.evaluate import EVALUATIONS, LinearSettings
from cae2pipe.evaluation.attentive import AttentiveProbe
from cae2pipe.evaluation.encoders import Student
from cae2pipe.evaluation.knn import knn_predictions
from cae2pipe.evaluation.linear import Probe, lars, lars_groups, logits, train_probe
from cae2pipe.evaluation.probe_learner import ProbeLearner
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.stages import evaluate as stage
from cae2pipe.stages import evaluate_dense as dense_stage
from cae2pipe.supervised.schedule import Chunk, all_images

BF16 = torch.autocast("cpu", torch.bfloat16)
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Products(TorchDispatchMode):
    """Records type and float32 precision of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.seen.add((args[-1].dtype, torch.get_float32_matmul_precision()))
        return func(*args, **(kwargs or {}))


EXACT = {(torch.float32, "highest")}


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(120, 16, generator=generator), torch.arange(120) % 3


def test_neighbours(features, backends):
    train, labels = features
    options = {"classes": 3, "k": [7], "temperature": 0.07}
    wanted = knn_predictions(train, labels, train + 0.5, **options)[7]
    torch.set_float32_matmul_precision("high")
    with BF16, Products() as products:
        got = knn_predictions(train, labels, train + 0.5, **options)[7]
    assert products.seen == EXACT
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.get_float32_matmul_precision() == "high"


def test_a_probe_on_fixed_features(features, backends):
    crops, labels = features
    settings = LinearSettings(cached_crops=1, epochs=3, warmup_epochs=1, sweep=(0.1, 1.0))
    wanted, _ = train_probe([crops], labels, classes=3, settings=settings, report=Silent())
    torch.set_float32_matmul_precision("high")
    with BF16, Products() as products:
        probe, _ = train_probe([crops], labels, classes=3, settings=settings, report=Silent())
        scores = logits(probe, crops)
    assert products.seen == EXACT
    assert torch.equal(probe.head.weight, wanted.head.weight)
    assert torch.equal(scores, logits(wanted, crops))


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_on_new_crops(kind, backends):
    """Except its encoder, which has its own precision."""
    head = Probe(16, 3) if kind == "linear" else AttentiveProbe(16, 3, 2)

    def inputs(encoder: None, pixels: torch.Tensor) -> torch.Tensor:
        tokens = pixels[:, 0, :, :].float() / 255
        return tokens[:, 0] if kind == "linear" else tokens

    schedule = all_images(8, 8, 2, chunk=4, epochs=2, seed=0)
    optimizer = (
        lars(lars_groups(head, 0.1, 8, taken=8), 0.9) if kind == "linear" else torch.optim.SGD(head.parameters())
    )
    for group in optimizer.param_groups:
        group.setdefault("peak", 0.1)
    learner = ProbeLearner(
        None,
        head,
        inputs,
        optimizer=optimizer,
        schedule=schedule,
        warmup_epochs=0.5,
        batch=4,
        world=World(0, 1, torch.device("cpu")),
    )
    pixels = torch.randint(0, 256, (4, 3, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("high")
    with BF16, Products() as products:
        learner.step([Chunk(0, 0, pixels, torch.tensor([0, 1, 2, 0]))], 0, 4)
        assert learner.logits(pixels).dtype == torch.float32
    assert products.seen == EXACT


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(
                    root / part / name / f"{number}.png"
                )
    return root


@pytest.mark.parametrize(
    ("kind", "over", "precision"),
    [
        ("knn", ["k=[1]", "features.precision=bf16"], "highest"),
        ("linear", ["cached_crops=1", "epochs=1", "warmup_epochs=0", "features.precision=bf16"], "highest"),
        ("attentive", ["epochs=1", "warmup_epochs=0", "features.precision=bf16"], "highest"),
        ("finetune", ["epochs=1", "warmup_epochs=0", "batch=4", "chunk=2", "precision=bf16"], "high"),
    ],
)
def test_tf32_is_for_networks_that_are_trained(kind, over, precision, exported, data, tmp_path, backends, monkeypatch):
    """Set before the encoder is loaded, and unchanged while it runs."""
    seen = []

    def watched(function):
        def called(*args, **options):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return function(*args, **options)

        return called

    monkeypatch.setattr(stage, "load_encoder", watched(stage.load_encoder))
    monkeypatch.setattr(Student, "tokens", watched(Student.tokens))
    torch.set_float32_matmul_precision("medium")
    settings = load(EVALUATIONS[kind], "evaluate", kind, overrides=[*over, "speed.device=cpu", "speed.workers=0"])
    stage.evaluate(kind, str(exported), data, out=tmp_path / "out", settings=settings, report=Silent())
    assert set(seen) == {(precision, precision == "high")}


@pytest.mark.parametrize("kind", DENSE)
def test_dense_scores_say_it_first(kind, tmp_path, backends, monkeypatch):
    def opened(*_):
        raise LookupError(torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark)

    for name in ("open_label_maps", "open_coco"):
        monkeypatch.setattr(dense_stage, name, opened)
    torch.set_float32_matmul_precision("medium")
    settings = load(DENSE[kind], "evaluate", kind, overrides=["precision=bf16", "speed.device=cpu"])
    with pytest.raises(LookupError) as caught:
        getattr(dense_stage, kind)("x", tmp_path, tmp_path / "out", settings=settings, report=Silent())
    # Images to detect on have many sizes: algorithms would be tried for each.
    assert caught.value.args == ("high", kind == "segment")
