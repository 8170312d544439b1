"""An evaluation that runs out of device memory: the error's fix is valid and reduces that memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from cae2pipe.config.base import load
from cae2pipe.config.dense import DetectSettings, SegmentSettings
from cae2pipe.config.evaluate import EVALUATIONS, AttentiveSettings, FinetuneSettings
from cae2pipe.errors import OutOfMemoryError
from cae2pipe.evaluation.encoders import Student
from cae2pipe.evaluation.finetune import FinetuneLearner
from cae2pipe.evaluation.linear import Probe
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import evaluate as stage
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.supervised.learner import TunedLearner, make_moments
from cae2pipe.supervised.remedies import SMALLER, smaller_chunk
from cae2pipe.supervised.schedule import Chunk

COMMON = ["speed.workers=0", "speed.device=cpu", "speed.batch=4"]
KINDS = {
    "knn": ["k=[1]"],
    "cached": ["cached_crops=1", "epochs=1", "warmup_epochs=0"],
    "linear": ["chunk=6", "epochs=1", "warmup_epochs=0"],
    "attentive": ["chunk=6", "epochs=1", "warmup_epochs=0"],
    "finetune": ["epochs=2", "warmup_epochs=0", "batch=12", "chunk=6"],
}
WITH_THEM = " --set features.precision=fp32 --set speed.batch=4 uses the same features"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def settings(kind: str, *over: str):
    name = "linear" if kind == "cached" else kind
    return load(EVALUATIONS[name], "evaluate", name, overrides=[*COMMON, *KINDS[kind], *over])


def score(kind: str, exported: Path, data: Path, out: Path, *over: str):
    name = "linear" if kind == "cached" else kind
    return evaluate(name, str(exported), data, out=out, settings=settings(kind, *over), report=Silent())


def full(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


def full_at(calls: int, function):
    """The function, failing from a given call on."""
    done = []

    def called(*args, **options):
        done.append(1)
        return full() if len(done) > calls else function(*args, **options)

    return called


@pytest.mark.parametrize(
    ("kind", "where", "name", "calls", "what", "fix"),
    [
        ("knn", Student, "tokens", 0, "a pass over 4 images", "--set speed.batch=2"),
        ("knn", stage, "knn_predictions", 0, "a set of 12 features", "--device cpu" + WITH_THEM),
        ("cached", Student, "tokens", 4, "a pass over 4 images", "--set speed.batch=2"),
        ("cached", stage, "train_probe", 0, "a set of 12 features", "--device cpu" + WITH_THEM),
        ("cached", stage, "logits", 0, "a set of 12 features", "--device cpu" + WITH_THEM),
        # The first call measures.
        ("linear", Student, "tokens", 1, "a pass over 4 images", "--set speed.batch=2"),
        ("attentive", Student, "tokens", 1, "a pass over 4 images", "--set speed.batch=2"),
        ("attentive", Student, "tokens", 5, "a pass over 4 images", "--set speed.batch=2"),
        ("linear", Probe, "forward", 0, "a chunk of 6 images", "--set chunk=3"),
        ("attentive", torch.optim.SGD, "step", 0, "a chunk of 6 images", "--set chunk=3"),
        # Mixup needs an even number.
        ("finetune", FinetuneLearner, "loss", 0, "a chunk of 6 images", "--set chunk=2"),
        ("finetune", torch.Tensor, "backward", 0, "a chunk of 6 images", "--set chunk=2"),
        ("finetune", FinetuneLearner, "logits", 0, "a pass over 4 images", "--set speed.batch=2"),
        ("finetune", torch.optim.AdamW, "step", 0, "AdamW's state for all weights", SMALLER),
        ("finetune", torch.optim.AdamW, "step", 1, "a chunk of 6 images", "--set chunk=2"),
    ],
)
def test_the_error(kind, where, name, calls, what, fix, exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, full_at(calls, getattr(where, name)))
    with pytest.raises(OutOfMemoryError) as caught:
        score(kind, exported, data, tmp_path, *(["mixup=0.8"] if kind == "finetune" else []))
    assert caught.value.what.startswith(f"{what} does not fit into the device's memory: CUDA out of memory. Tried")
    assert "more of it" not in caught.value.what
    assert caught.value.fix == fix
    overrides = [word for word in fix.split() if "=" in word]
    settings(kind, *overrides)
    monkeypatch.undo()
    # With the fix, the same command runs to the end.
    if overrides:
        assert score(kind, exported, data, tmp_path, *overrides)["images"]["val"] == 12


def test_an_upload_counts_as_its_chunk(exported, data, tmp_path, monkeypatch):
    def uploaded(items, device, stream=None):
        yield next(iter(items))
        full()

    for module in ("supervised.learner", "evaluation.probe_learner"):
        monkeypatch.setattr(f"cae2pipe.{module}.uploaded", uploaded)
    for kind, fix in (("linear", "--set chunk=3"), ("finetune", "--set chunk=2")):
        with pytest.raises(OutOfMemoryError) as caught:
            score(kind, exported, data, tmp_path)
        assert caught.value.fix == fix


@pytest.mark.parametrize("kind", ["knn", "finetune"])
def test_an_upload_counts_as_its_batch(kind, exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr("cae2pipe.evaluation.crop_batches.uploaded", full)
    with pytest.raises(OutOfMemoryError) as caught:
        score(kind, exported, data, tmp_path)
    assert caught.value.fix == "--set speed.batch=2"


def test_with_a_checkpoint_other_chunks_need_another_folder(exported, data, tmp_path, monkeypatch):
    real = FinetuneLearner.loss

    def loss(self, chunk: Chunk):
        return full() if chunk.step else real(self, chunk)

    monkeypatch.setattr(FinetuneLearner, "loss", loss)
    with pytest.raises(OutOfMemoryError) as caught:
        score("finetune", exported, data, tmp_path)
    assert caught.value.where == "step 1"
    assert caught.value.fix.startswith("--set chunk=2, and use a new output folder")


@given(
    batch=st.integers(1, 64),
    divisor=st.integers(1, 16),
    ranks=st.integers(1, 4),
    kind=st.sampled_from([FinetuneSettings, SegmentSettings, DetectSettings, AttentiveSettings]),
    mixup=st.booleans(),
)
def test_half_a_chunk_is_legal_or_there_is_none(batch, divisor, ranks, kind, mixup):
    mixed = {} if mixup or kind is not FinetuneSettings else {"mixup": 0, "cutmix": 0}

    def valid(chunk: int):
        try:
            return kind.model_validate({"batch": batch, "chunk": chunk, **mixed})
        except ValidationError:
            return None

    chunk = batch // divisor
    if (given := valid(chunk)) is None:
        return
    shared = kind is AttentiveSettings
    legal = [c for c in range(1, chunk // 2 + 1) if valid(c) and (shared or batch // c % ranks == 0)]
    assert smaller_chunk(given, chunk, ranks) == max(legal, default=None)


def test_moments_made_ahead_change_nothing():
    class Learner(TunedLearner):
        def __init__(self):
            torch.manual_seed(0)
            self.network = torch.nn.Linear(4, 3)
            groups = [{"params": list(self.network.parameters()), "lr_scale": 1.0, "weight_decay": 0.05}]
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)

        def loss(self, chunk): ...

        def rate(self, step):
            return 0.1

        def train(self):
            for step in range(3):
                self.optimizer.zero_grad()
                self.network(torch.arange(4.0) + step).square().sum().backward()
                self.optimizer.param_groups[0]["lr"] = 0.1
                self.optimizer.step()

    ahead, plain = Learner(), Learner()
    before = [p.clone() for p in ahead.network.parameters()]
    make_moments(ahead.optimizer)
    assert all(torch.equal(p, q) for p, q in zip(ahead.network.parameters(), before, strict=True))
    assert [p.grad for p in ahead.network.parameters()] == [None, None]
    moments = [state[name] for state in ahead.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]
    assert len(moments) == 6
    assert not any(moment.any() for moment in moments)
    ahead.train(), plain.train()
    for name, weight in ahead.network.state_dict().items():
        assert torch.equal(weight, plain.network.state_dict()[name])
    for own, other in zip(ahead.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in other)
