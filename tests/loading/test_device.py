"""Batches on the training device, and JPEGs decoded there. Streams are tested in tests/cuda."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cae2pipe.errors import DamageError
from cae2pipe.images import jpeg
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import decoded, on_device
from cae2pipe.loading.loader import load_batches, load_parts
from cae2pipe.loading.plan import Plan
from cae2pipe.loading.planning import make_plan
from cae2pipe.targets.store import StoreReader
from cae2pipe.targets.target_set import TargetSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["replayed", "stored"])
def plans(request, target_root, stored_root, pretrain_settings) -> dict[str, Plan]:
    """The same batches, decoded by the workers and on the device."""
    targets = TargetSet({"replayed": target_root, "stored": stored_root}[request.param])
    settings = {place: pretrain_settings(data={"decode": place}) for place in ("workers", "device")}
    return {place: make_plan(targets, sorted(targets.stores), settings[place], drop_columns=4) for place in settings}


def given(plan: Plan, start: int = 0) -> list[Batch]:
    return list(on_device(load_parts(plan, start, 0), plan.layout.sample_axes(), CPU))


def test_jpegs_decoded_on_the_device_are_those_that_the_workers_decode(plans):
    here, there = (given(plan) for plan in plans.values())
    assert any(0 < batch.weights.sum() < len(batch.weights) for batch in there)  # one with padding
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.weights, other.weights)
    assert next(load_batches(plans["device"], 0, 2)).pixels.shape[0] == 0


def test_a_step_of_padding_alone_decodes_to_nothing(plans):
    batch = next(load_batches(plans["device"], 0, 0))
    pixels = decoded(replace(batch, jpegs=batch.jpegs[:0], sizes=batch.sizes * 0), CPU).pixels
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (32, 3, 32, 32))
    assert not pixels.any()


@pytest.mark.parametrize("plans", ["stored"], indirect=True)
@pytest.mark.parametrize("place", ["workers", "device"])
def test_a_view_of_another_size_is_damage_and_named(plans, place):
    with pytest.raises(DamageError, match="32 x 32 pixels instead of 64 x 64") as caught:
        given(replace(plans[place], size=64, view_size=64))
    assert "key class" in caught.value.where
    assert caught.value.fix == "run `cae2pipe verify`"


@pytest.mark.parametrize("plans", ["replayed"], indirect=True)
@pytest.mark.parametrize("place", ["workers", "device"])
def test_an_image_of_another_size_than_its_draws_is_damage_and_named(plans, place, monkeypatch):
    real = StoreReader.records

    def shifted(reader, block):
        records = real(reader, block)
        return replace(records, draws=records.draws + np.eye(11)[10])

    monkeypatch.setattr(StoreReader, "records", shifted)
    with pytest.raises(DamageError, match="the view was drawn for an image of") as caught:
        given(plans[place])
    assert "key class" in caught.value.where
    assert caught.value.fix == "run `cae2pipe verify`"


def test_a_view_that_a_device_cannot_decode_is_named(plans):
    batch = next(load_batches(plans["device"], 0, 0))
    spoilt = batch.jpegs.clone()
    spoilt[int(batch.sizes[:5].sum()) :][:100] = 0
    with pytest.raises(DamageError, match="cannot be decoded") as caught:
        decoded(replace(batch, jpegs=spoilt), CPU)
    assert caught.value.where == f"step 0, key {batch.keys[5]}"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: unknown error")]
)
def test_what_ails_the_device_passes_unchanged(plans, monkeypatch, error):
    def decode(images, mode, device):
        raise error

    monkeypatch.setattr(jpeg, "device_decoder", lambda: decode)
    with pytest.raises(type(error)) as caught:
        given(plans["device"])
    assert caught.value is error
