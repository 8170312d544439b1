"""The linear probe: accuracy on sets of every size, agreement with the paper, reproducibility by seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.config.base import build_recorded, fingerprinted, load
from cae2pipe.config.evaluate import DrawSettings, FinetuneSettings, LinearSettings
from cae2pipe.errors import DivergedError, SourceError
from cae2pipe.evaluation.linear import (
    Probe,
    batch_and_steps,
    fit,
    held_out,
    lars,
    lars_groups,
    logits,
    train_probe,
)
from cae2pipe.evaluation.protocols import protocol
from cae2pipe.evaluation.scores import accuracy, from_scores
from cae2pipe.runtime.progress import Silent


def clusters(images: int, classes: int, dim: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one centre per class, far from the origin and of different scales; the centres do not depend on
    ``seed``."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(images) % classes
    noise = torch.randn(images, dim, generator=torch.Generator().manual_seed(seed))
    return (centres[labels] + 0.5 * noise + 3) * torch.logspace(-2, 2, dim), labels


def probe(images: int = 120, classes: int = 3, **settings):
    train, test = clusters(images, classes, seed=1), clusters(90, classes, seed=2)
    return scored(train, test, classes, **settings)


def scored(train, test, classes: int, **settings) -> dict:
    """The figures of a probe trained on ``train``, and its accuracy on ``test``."""
    options = LinearSettings(cached_crops=1, **settings)
    head, figures = train_probe([train[0]], train[1], classes=classes, settings=options, report=Silent())
    return {**figures, **accuracy(from_scores(logits(head, test[0]), test[1], []))}


@pytest.mark.parametrize(("images", "classes"), [(3, 3), (6, 3), (16, 4), (17, 4), (65, 3), (150, 3), (1500, 10)])
def test_separable_features_are_separated_whatever_the_size_of_the_set(images, classes):
    result = probe(images, classes)
    assert result["top1"] >= 0.97
    assert result["top5"] >= result["top1"]
    assert len(result["losses"]) == 90
    assert result["train_loss"] == result["losses"][-1] < 0.2 * result["losses"][0]


def test_labels_without_meaning_are_not_predicted():
    train, labels = clusters(200, 4)
    shuffled = labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    result = scored((train, shuffled), clusters(200, 4, seed=3), 4)
    assert result["top1"] < 0.6


def test_equal_seeds_give_equal_results():
    first, again, other = probe(epochs=12), probe(epochs=12), probe(epochs=12, seed=1)
    assert first == again
    assert first["losses"] != other["losses"]


def test_the_head_is_the_papers():
    torch.manual_seed(0)
    head = Probe(512, 1000)
    assert head.norm.eps == 1e-6
    assert [name for name, _ in head.named_parameters()] == ["head.weight", "head.bias"]  # BatchNorm without affine
    assert float(head.head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not head.head.bias.any()


@pytest.mark.parametrize(("preset", "batch", "chunk"), [("linear-tiny", 16384, 2048), ("linear", 8192, 1024)])
def test_the_scripts_batches_are_recipe_official(preset, batch, chunk):
    """8 devices with 2048 images each for Tiny, 1024 for Small and Base; the paper has 16384 for all."""
    paper, official = (
        load(LinearSettings, "evaluate", preset, overrides=[f"recipe={recipe}"]) for recipe in ("paper", "official")
    )
    assert (paper.batch, paper.chunk) == (16384, 256)
    assert (official.batch, official.chunk) == (batch, chunk)
    assert official.model_copy(update={"batch": 16384, "chunk": 256, "recipe": "paper"}) == paper


def test_crops_are_maes_and_earlier_scores_keep_their_fingerprint():
    partly = load(LinearSettings, "evaluate", "linear", overrides=["draw.flip=0"])
    assert partly.draw.clip
    assert not FinetuneSettings().draw.clip
    earlier = fingerprinted(LinearSettings(draw=DrawSettings()))
    assert earlier.keys() == LinearSettings.model_fields.keys() - {"recipe", "speed"}
    assert "clip" not in earlier["draw"]
    assert not build_recorded(LinearSettings, earlier, "here").draw.clip
    assert fingerprinted(LinearSettings())["draw"] == {**earlier["draw"], "clip": True}


def test_protocols_name_what_differs():
    lines = {
        protocol(LinearSettings(**over), 224)
        for over in ({}, {"draw": DrawSettings()}, {"chunk": 1024}, {"cached_crops": 3}, {"cached_crops": 1})
    }
    assert len(lines) == 5
    assert any("new crops with clipped sides every epoch, BatchNorm over 1024" in line for line in lines)


def test_learning_rates_of_a_full_batch_are_the_papers(monkeypatch):
    """With one batch or more, weights and bias have the same peak rate, 0.1 x batch / 256. Only weights are adapted."""
    import timm.optim

    seen = []

    class Spy(timm.optim.Lars):
        def step(self, closure=None):
            seen.append([(group["lr"], group["always_adapt"], group["weight_decay"]) for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(timm.optim, "Lars", Spy)
    probe(images=1600, epochs=4, warmup_epochs=1, batch=64)
    assert len(seen) == 4 * 25
    assert all(weight[0] == bias[0] for weight, bias in seen)
    assert seen[0][0][0] == 0
    assert max(weight[0] for weight, _ in seen) == pytest.approx(0.1 * 64 / 256)
    assert seen[-1][0][0] == pytest.approx(0, abs=1e-9)
    assert {(weight[1:], bias[1:]) for weight, bias in seen} == {((True, 0.0), (False, 0.0))}


@given(images=st.integers(2, 10**7), batch=st.integers(2, 20000))
def test_batches_are_never_too_small_for_batchnorm(images, batch):
    size, steps = batch_and_steps(images, batch)
    assert size <= batch
    assert images // steps >= 2  # tensor_split's smallest
    assert -(-images // steps) <= max(size, 3)  # its largest; three where pairs would leave one over
    if images >= 16 * batch:
        assert size == batch


def test_one_image_is_too_few():
    with pytest.raises(SourceError, match="at least two"):
        probe(images=1, classes=1)


def test_a_loss_that_is_not_finite_ends_the_probe():
    train, labels = clusters(200, 4)
    shuffled = labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(DivergedError, match="not finite"):
        scored((train, shuffled), (train, labels), 4, lr=1e4, warmup_epochs=0)


def test_rates_trained_side_by_side_are_those_trained_alone():
    train, labels = clusters(200, 3, seed=1)
    settings = LinearSettings(epochs=12)
    together, losses = fit([train], labels, classes=3, settings=settings, rates=[0.01, 0.1, 1.0], report=Silent())
    for rate, probe, own in zip([0.01, 0.1, 1.0], together, losses, strict=True):
        (alone,), (wanted,) = fit([train], labels, classes=3, settings=settings, rates=[rate], report=Silent())
        assert own == wanted
        assert torch.equal(probe.head.weight, alone.head.weight)


def test_a_sweep_takes_the_best_on_held_out_training_images_and_never_looks_at_the_test_set():
    rates = (1e-5, 0.1)
    result = probe(600, epochs=12, sweep=rates)
    assert result["lr"] == 0.1
    assert result["held_out"].keys() == {"1e-05", "0.1"}
    assert result["held_out"]["0.1"] > result["held_out"]["1e-05"]
    plain = probe(600, epochs=12)
    assert {name: result[name] for name in plain} == plain
    train, test = clusters(600, 3, seed=1), clusters(90, 3, seed=2)
    nonsense = scored(train, (torch.zeros_like(test[0]), test[1]), 3, epochs=12, sweep=rates)
    assert nonsense["held_out"] == result["held_out"]


def test_a_rate_that_diverges_is_not_taken():
    result = probe(epochs=12, sweep=(0.1, 1e4))
    assert result["lr"] == 0.1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_every_class_keeps_images_to_train_on(share):
    labels = torch.tensor([0] * 40 + [1] * 3 + [2])
    held = held_out(labels, share, 0)
    for label, count in ((0, 40), (1, 3), (2, 1)):
        taken = int(held[labels == label].sum())
        assert taken == min(round(share * count), count - 1)
    assert torch.equal(held, held_out(labels, share, 0))


def test_too_few_to_hold_any_out():
    with pytest.raises(SourceError, match="too few to hold"):
        probe(3, 3, sweep=(0.1,))


def test_lars_step_by_step_as_by_hand():
    """You et al. 2017: momentum of the gradient, which for weights is scaled by 0.001 |w| / |g| first."""
    torch.manual_seed(0)
    probe = Probe(6, 3)
    groups = lars_groups(probe, lr=0.1, batch=16384, taken=512)
    optimizer = lars(groups, 0.9)
    wanted = [probe.head.weight.detach().clone(), probe.head.bias.detach().clone()]
    momentum = [torch.zeros_like(tensor) for tensor in wanted]
    peaks = [0.1 * 16384 / 256, 0.1 * 512 / 256]
    for step, factor in enumerate((0.0, 0.5, 1.0, 0.7)):
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        gradients = [torch.randn_like(tensor) for tensor in wanted]
        probe.head.weight.grad, probe.head.bias.grad = (gradient.clone() for gradient in gradients)
        optimizer.step()
        for number, gradient in enumerate(gradients):
            if number == 0:
                gradient = gradient * (0.001 * wanted[0].norm() / gradient.norm())
            momentum[number] = gradient if step == 0 else 0.9 * momentum[number] + gradient
            wanted[number] = wanted[number] - factor * peaks[number] * momentum[number]
        torch.testing.assert_close(probe.head.weight.detach(), wanted[0])
        torch.testing.assert_close(probe.head.bias.detach(), wanted[1])
