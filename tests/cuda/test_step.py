"""Steps of every method on a device: all tensors are there, types are right, nothing waits, figures equal the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cae2pipe.config.base import load, preset_names
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.registry import METHODS, build_method
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.world import World
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import compile_objective, make_objective
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Flags, Step, cached, forward
from cae2pipe.training.target_spec import PixelTargets, target_spec
from tests.cuda.simulated import on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FP32, BF16 = torch.float32, torch.bfloat16
NEAR = {"fp32": {"rel": 1e-5, "abs": 1e-6}, "bf16": {"rel": 2e-2, "abs": 2e-2}}


def small(preset: str, *overrides: str, rows: int = 16) -> PretrainSettings:
    """A preset with a student that fits the tiny target set. Widths or heads that differ in the preset still differ."""
    model = load(PretrainSettings, "pretrain", preset, overrides=overrides).model
    shape = {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "layer_scale": 0.1,
        "drop_path": 0.1,
        "predictor_layer_scale": 0.1,
        "predictor_depth": 1,
        "predictor_width": 32 if model.predictor_width == model.width else 16,
        "predictor_heads": 3 if model.predictor_width % model.predictor_heads else 2,
    }
    sections = {
        "model": shape,
        "mask": {"count": 6},
        "data": {"batch": rows, "streams": 4, "window": 1, "last_batch": "pad"},
        "optimizer": {"warmup_epochs": 1},
        "epochs": 2,
        "speed": {"workers": 0},
    }
    return load(PretrainSettings, "pretrain", preset, overrides=overrides, values=sections)


def presets() -> Iterator[tuple[str, str]]:
    """Presets and recipes that still differ when they are small."""
    seen = []
    for recipe in ("paper", "official"):
        for name in ("base", *preset_names("pretrain")):
            settings = small(name, f"recipe={recipe}")
            what = (settings.method, settings.model, settings.loss, settings.mask.strategy)
            if what not in seen:
                seen.append(what)
                yield name, recipe


@pytest.fixture
def make(target_root, wide_root, summary_root) -> Callable[..., tuple[Step, Iterator[Batch]]]:
    """A step, made as the stage makes it, and batches on the host. ``several``: with two teachers, one of which has
    summaries."""

    def made(settings: PretrainSettings, device: torch.device, several: bool = False) -> tuple[Step, Iterator[Batch]]:
        targets, *others = map(TargetSet, (wide_root, summary_root) if several else (target_root,))
        torch.manual_seed(0)
        spec = target_spec(settings, targets, others)
        model = build_method(settings.method, settings.model, spec.dim, spec.summary).to(device)
        model.recompute(settings.speed.recompute)
        objective = make_objective(model, targets, settings, others=others).to(device).train()
        objective.place(device)
        pixels = settings.loss.target == "pixels"
        columns = model.drop_columns + objective.columns
        plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=columns, others=others)
        step = Step(
            objective,
            objective,
            build_optimizer(model, settings.optimizer),
            axes=plan.sample_axes(),
            latents=PixelTargets(settings.model.grid, device) if pixels else cached,
            accumulation=settings.speed.accumulation,
            clip=settings.optimizer.clip,
            world=World(0, 1, device),
        )
        return step, iter(load_batches(plan, 0, 0))

    return made


def check_on_device(step: Step) -> None:
    """All state after a step is on the device, and all but indices in float32."""
    tensors: dict[str, Tensor] = dict(step.objective.named_parameters()) | dict(step.objective.named_buffers())
    for name, parameter in step.model.named_parameters():
        tensors[f"gradient of {name}"] = parameter.grad
        for moment, tensor in step.optimizer.state[parameter].items():
            tensors[f"{moment} of {name}"] = tensor
    tensors["spoilt"] = step.found_inf
    kinds = {name: (tensor.device, tensor.dtype) for name, tensor in tensors.items()}
    indices = {name for name in kinds if name.endswith("places.pairs")}
    assert kinds == dict.fromkeys(tensors, (CUDA, FP32)) | dict.fromkeys(indices, (CUDA, torch.int64))


def compare(cuda, make, settings: PretrainSettings, **given: bool) -> None:
    """A step gives the same figures on the device and on the CPU. ``given``: to ``make``."""
    plain, batches = make(settings, CPU, **given)
    batch = next(batches)
    wanted = plain.backward(batch, 1).tolist()
    with cuda:
        step, _ = make(settings, CUDA, **given)
        batch = batch.to(CUDA)
        cuda.waits.clear()
        outcome = step(batch, 1e-3, Flags(waited=0.5, stop=True))
        assert cuda.waits == []
        check_on_device(step)
    values = outcome.values()
    assert [values[name] for name in step.objective.terms] == pytest.approx(wanted, **NEAR[settings.precision])
    assert outcome.flags() == (0.5, 1.0, 0.0)


def check_products(cuda, settings: PretrainSettings) -> None:
    """The model's matrix products are in its own type; decoding the latents takes two in float32 per part."""
    decoding = 0 if settings.loss.target == "pixels" else 2 * settings.speed.accumulation
    if settings.precision == "fp32":
        assert set(cuda.products) == {FP32}
    else:
        assert set(cuda.products) - {FP32} == {BF16}
        assert cuda.products[FP32] == decoding


def test_every_method_has_a_preset():
    assert {small(name).method for name in preset_names("pretrain")} == set(METHODS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "recipe"), list(presets()))
def test_a_step_of_every_preset(preset, recipe, precision, cuda, make):
    settings = small(preset, f"recipe={recipe}", f"precision={precision}")
    compare(cuda, make, settings)
    check_products(cuda, settings)


@pytest.mark.parametrize("preset", ["base", "cae", "fd", "mae-pixels", "milan", "mvp"])
def test_parts_of_a_batch_with_repeated_masks_and_recomputation(preset, cuda, make):
    varied = ("mask.repeat=2", "speed.accumulation=2", "speed.recompute=true", "precision=bf16")
    settings = small(preset, *varied, rows=32)
    assert settings.loaded_batch == 16
    compare(cuda, make, settings)
    check_products(cuda, settings)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("preset", ["base", "cae", "mae-pixels"])
def test_positions_that_attention_knows(positions, preset, cuda, make):
    settings = small(preset, f"model.{positions}_positions=true", "speed.recompute=true", "precision=bf16", rows=32)
    compare(cuda, make, settings)
    check_products(cuda, settings)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("preset", ["base", "fd"])
def test_several_teachers(kind, preset, cuda, make):
    """Of unlike widths, in parts of a batch, with teachers dropped at random."""
    varied = (f"loss.kind={kind}", "loss.drop_teachers=0.5", "loss.teachers={wide: 2}", "speed.accumulation=2")
    compare(cuda, make, small(preset, *varied, "precision=bf16", rows=32), several=True)


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
@pytest.mark.parametrize("target", ["as_is", "layer_norm"])
@pytest.mark.parametrize("latents", ["stored", "raw"])
def test_losses_on_stored_and_on_raw_latents(kind, target, latents, cuda, make):
    """Stored latents with norms if lengths count; raw latents as from an online teacher, not normalised."""
    step, batches = make(small("base", f"loss.kind={kind}", f"loss.target={target}"), CPU)
    batch = next(batches)
    assert ("norms" in batch.arrays) is (kind != "cosine")
    given = {"raw": 3 * step.objective.parts[0].codec.decode(batch.arrays)} if latents == "raw" else batch.arrays
    wanted = forward(step.objective, batch, given)
    with cuda:
        objective = step.objective.to(CUDA)
        objective.parts[0].codec.place(CUDA)
        batch, given = batch.to(CUDA), {name: array.to(CUDA) for name, array in given.items()}
        cuda.waits.clear()
        terms = forward(objective, batch, given)
        assert cuda.waits == []
        assert (terms.device, terms.dtype) == (CUDA, FP32)
    torch.testing.assert_close(on_cpu(terms), wanted.detach())


def test_what_is_not_finite_changes_nothing_then_or_later(cuda, make):
    with cuda:
        step, batches = make(small("base", "precision=bf16"), CUDA)
        step(next(batches).to(CUDA), 1e-3)

        def state() -> list[Tensor]:
            moments = [tensor for parameter in step.parameters for tensor in step.optimizer.state[parameter].values()]
            return [on_cpu(tensor).clone() for tensor in (*(p.detach() for p in step.parameters), *moments)]

        before = state()
        batch = next(batches).to(CUDA)
        values = step(replace(batch, weights=batch.weights * torch.nan), 1e-3).values()
        assert values["loss"] != values["loss"]
        step(next(batches).to(CUDA), 1e-3)
        assert on_cpu(step.found_inf).item() == 1
        assert all(torch.equal(one, other) for one, other in zip(state(), before, strict=True))


def test_gradients_are_clipped_on_the_device(cuda, make):
    with cuda:
        step, batches = make(small("base", "optimizer.clip=0.5"), CUDA)
        batch = next(batches).to(CUDA)
        cuda.waits.clear()
        outcome = step(batch, 1e-3)
        assert cuda.waits == []
        count = sum(p.numel() for p in step.parameters)
        clipped = torch.cat([on_cpu(p.grad).flatten() for p in step.parameters])
    assert outcome.values()["grad_norm"] == pytest.approx(count**0.5)  # gradients of ones
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_a_step_of_another_device_than_the_current_one(cuda, make, machine):
    other = torch.device("cuda:5")
    with cuda:
        step, batches = make(small("base"), other)
        values = step(next(batches).to(other), 1e-3).values()
    assert all(value == value for value in values.values())
    assert machine.current == 0


@pytest.mark.parametrize(("name", "device"), [("cuda", CUDA), ("cuda:2", torch.device("cuda:2"))])
def test_what_is_placed_for_a_compiled_step_is_what_the_step_looks_up(name, device, cuda, make, monkeypatch):
    """Otherwise the codec's constants would be created within the graph, and the second step would compile again."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    taken = pick_device(name)
    with cuda:
        step, batches = make(small("base"), taken)
        compile_objective(step.objective, step.world)
        step(next(batches).to(taken), 1e-3)
        assert list(step.objective.parts[0].codec._placed) == [device]
