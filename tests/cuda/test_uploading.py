"""Uploads of evaluations: nothing is lost, and everything is ready when it is used."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import ScoresArtifact
from cae2pipe.config.evaluate import FinetuneSettings, TrainedSpeed
from cae2pipe.dense.box_crops import BoxChunk
from cae2pipe.evaluation.crop_batches import CropBatch
from cae2pipe.evaluation.datasets import Crops
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.upload import pinned, uploaded
from cae2pipe.runtime.world import World
from cae2pipe.supervised import loop
from cae2pipe.supervised.schedule import Chunk, Reader, TrainSchedule

DEVICE = torch.device("cuda", 1)


def boxes(count: int) -> dict[str, Tensor]:
    return {"boxes": torch.zeros(count, 4), "labels": torch.ones(count), "masks": torch.zeros(count, 4, 4)}


def pixels(number: int) -> Tensor:
    return torch.full((2, 3, 4, 4), number, dtype=torch.uint8)


ITEMS = {
    "classification": lambda n: Chunk(n, 0, pixels(n), torch.tensor([0, 1]), ({"path": "x", "reason": "y"},)),
    "segmentation": lambda n: Chunk(n, 0, pixels(n), torch.zeros(2, 4, 4, dtype=torch.int64)),
    "detection": lambda n: BoxChunk(n, 0, pixels(n), torch.tensor([0, 1]), (), ((4, 4), (3, 4)), (boxes(2), boxes(0))),
    "crops": lambda n: CropBatch(pixels(n), Crops(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), ["a", "b"], [])),
}


def tensors(value: Any) -> list[Tensor]:
    """All tensors in an item, at any depth."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for field in fields(value) for tensor in tensors(getattr(value, field.name))]
    return []


@pytest.fixture
def log(monkeypatch) -> list[tuple[str, Any]]:
    """Calls to torch, in order; tensors stay on the CPU, and record what happened to them."""
    done: list[tuple[str, Any]] = []
    streams = {DEVICE: "main"}
    move = Tensor.to

    def marked(tensor: Tensor, **marks: Any) -> Tensor:
        changed = tensor.clone()
        changed.__dict__.update(tensor.__dict__, **marks)
        return changed

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if args[:1] != (DEVICE,):
            return move(self, *args, **options)
        assert options == {"non_blocking": True}
        return marked(self, place=DEVICE, stream=streams[DEVICE])

    class Event:
        def record(self, stream: str) -> None:
            done.append(("recorded", stream))

    class Main:
        def wait_event(self, event: Event) -> None:
            done.append(("waited", None))

    @contextmanager
    def stream(name: str):
        streams[DEVICE] = name
        yield
        streams[DEVICE] = "main"

    monkeypatch.setattr(Tensor, "pin_memory", lambda self: marked(self, pinned_=True))
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: self.__dict__.update(used_on=stream))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side" if device == DEVICE else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Main())
    return done


@pytest.mark.parametrize("kind", ITEMS)
def test_nothing_of_an_item_is_lost(kind, log):
    items = [ITEMS[kind](number) for number in range(3)]
    for got, item in zip(uploaded(pinned(items, DEVICE), DEVICE), items, strict=True):
        assert type(got) is type(item)
        assert len(tensors(got)) == len(tensors(item)) >= 1
        for moved, own in zip(tensors(got), tensors(item), strict=True):
            assert (moved.pinned_, moved.place, moved.stream) == (True, DEVICE, "side")
            assert hasattr(moved, "used_on")
            assert torch.equal(moved, own)
        others = [field.name for field in fields(item) if not tensors(getattr(item, field.name))]
        assert [getattr(got, name) for name in others] == [getattr(item, name) for name in others]


def test_all_kinds_of_chunks_are_among_these():
    assert {Chunk, *Chunk.__subclasses__()} == {type(make(0)) for name, make in ITEMS.items() if name != "crops"}


def test_each_is_on_its_way_before_the_last_one_is_given_out(log):
    batches = uploaded((ITEMS["crops"](number) for number in range(3)), DEVICE)
    for expected in (["recorded", "recorded", "waited"], ["recorded", "waited"], ["waited"]):
        next(batches)
        assert [what for what, _ in log] == expected
        log.clear()
    assert next(batches, None) is None


@pytest.mark.parametrize("kind", ["classification", "segmentation", "detection"])
def test_training_hands_on_what_was_read(kind, log, tmp_path):
    """Pinned but not copied: the learner decides how much is on the device at once."""

    class Ready(Reader):
        root = tmp_path

        def __getitem__(self, index: int) -> Chunk:
            return ITEMS[kind](index)

    class Learner:
        def __init__(self) -> None:
            self.seen: list[Chunk] = []

        def step(self, chunks: list[Chunk], step: int, size: int) -> Tensor:
            self.seen += chunks
            return torch.zeros(())

        def rate(self, step: int) -> float:
            return 0.0

        def validates(self, epoch: int) -> bool:
            return False

        def state(self) -> dict[str, Any]:
            return {}

    schedule = TrainSchedule(images=8, used=8, steps=2, chunks=2, epochs=1, seed=0)
    settings, learner = FinetuneSettings(speed=TrainedSpeed(workers=0)), Learner()
    world = World(0, 1, DEVICE)
    ScoresArtifact.open_or_create(tmp_path, {"encoder": {}, "data": {}}, facts={}, fix="")
    loop.train(
        learner,
        schedule,
        lambda start: Ready(schedule, range(2), start),
        root=tmp_path,
        settings=settings,
        world=world,
        report=Silent(),
    )
    wanted = [ITEMS[kind](number) for number in range(4)]
    assert [chunk.step for chunk in learner.seen] == [0, 1, 2, 3]
    for got, item in zip(learner.seen, wanted, strict=True):
        assert type(got) is type(item)
        assert [tensor.pinned_ for tensor in tensors(got)] == [True] * len(tensors(item))
