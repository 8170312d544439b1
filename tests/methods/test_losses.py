import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.config.pretrain import LossSettings
from cae2pipe.methods.losses import Prediction, alignment_loss, centred_cosine

KINDS = ("cosine", "mse", "smooth_l1")


def predicted(prediction: Prediction) -> list[torch.Tensor]:
    """Its latents: class token, visible, masked."""
    return [prediction.class_token, prediction.visible, prediction.masked]


def case(samples: int = 3, patches: int = 6, hidden: int = 2, dim: int = 5, seed: int = 0):
    """A random prediction with class token, its target (samples, 1 + patches, dim), and the indices of the patches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(patches, generator=generator) for _ in range(samples)])
    visible, masked = order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values

    def tokens(count: int) -> torch.Tensor:
        return torch.randn(samples, count, dim, generator=generator)

    return Prediction(tokens(1), tokens(patches - hidden), tokens(hidden)), tokens(1 + patches), visible, masked


def by_hand(prediction, target, visible, masked, kind, class_token=True):
    """Distances per token: a list for visible tokens, a list for masked ones."""

    def distance(a, b):
        a, b = a.tolist(), b.tolist()
        if kind == "cosine":
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            return 1 - dot / math.hypot(*a) / math.hypot(*b)
        gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
        if kind == "mse":
            return sum(gap**2 for gap in gaps) / len(gaps)
        return sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)

    first = 1 if class_token else 0
    seen, hidden = [], []
    for sample in range(len(target)):
        if class_token:
            seen.append(distance(prediction.class_token[sample, 0], target[sample, 0]))
        for index, patch in enumerate(visible[sample].tolist()):
            seen.append(distance(prediction.visible[sample, index], target[sample, first + patch]))
        for index, patch in enumerate(masked[sample].tolist()):
            hidden.append(distance(prediction.masked[sample, index], target[sample, first + patch]))
    return seen, hidden


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", KINDS)
def test_two_means_are_the_papers_equations(kind):
    prediction, target, visible, masked = case()
    seen, hidden = by_hand(prediction, target, visible, masked, kind)
    assert (len(seen), len(hidden)) == (15, 6)
    terms = alignment_loss(
        prediction,
        target,
        visible,
        masked=masked,
        settings=LossSettings(kind=kind),
        weights=torch.ones(3),
        has_class_token=True,
    )
    assert terms.visible.item() == pytest.approx(mean(seen), rel=1e-5)
    assert terms.masked.item() == pytest.approx(mean(hidden), rel=1e-5)
    assert terms.total.item() == pytest.approx(mean(seen) + mean(hidden), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_mean_is_over_all_tokens(kind):
    prediction, target, visible, masked = case()
    seen, hidden = by_hand(prediction, target, visible, masked, kind)
    loss = LossSettings(kind=kind, reduction="one_mean")
    terms = alignment_loss(
        prediction, target, visible, masked=masked, settings=loss, weights=torch.ones(3), has_class_token=True
    )
    assert terms.total.item() == pytest.approx(mean(seen + hidden), rel=1e-5)
    assert terms.visible.item() == pytest.approx(mean(seen), rel=1e-5)


def test_a_teacher_without_class_token():
    prediction, target, visible, masked = case()
    seen, hidden = by_hand(prediction, target[:, 1:], visible, masked, "cosine", class_token=False)
    terms = alignment_loss(
        prediction,
        target[:, 1:],
        visible,
        masked=masked,
        settings=LossSettings(),
        weights=torch.ones(3),
        has_class_token=False,
    )
    assert len(seen) == 12
    assert terms.total.item() == pytest.approx(mean(seen) + mean(hidden), rel=1e-5)
    one = LossSettings(reduction="one_mean")
    terms = alignment_loss(
        prediction, target[:, 1:], visible, masked=masked, settings=one, weights=torch.ones(3), has_class_token=False
    )
    assert terms.total.item() == pytest.approx(mean(seen + hidden), rel=1e-5)


@pytest.mark.parametrize("reduction", ["two_means", "one_mean"])
def test_weights_of_visible_and_masked(reduction):
    prediction, target, visible, masked = case()

    def total(**weights):
        loss = LossSettings(reduction=reduction, **weights)
        return alignment_loss(
            prediction, target, visible, masked=masked, settings=loss, weights=torch.ones(3), has_class_token=True
        ).total.item()

    seen, hidden = total(visible=1, masked=0), total(visible=0, masked=1)
    assert total(visible=2, masked=0.5) == pytest.approx(2 * seen + 0.5 * hidden, rel=1e-5)


def test_the_official_mean_shares_out_as_the_tokens_do():
    """Base: 99 visible tokens with the class token, 98 masked (released code: .50 : .50)."""
    prediction, target, visible, masked = case(samples=2, patches=196, hidden=98)
    one, two = (
        alignment_loss(
            prediction,
            target,
            visible,
            masked=masked,
            settings=LossSettings(reduction=reduction),
            weights=torch.ones(2),
            has_class_token=True,
        )
        for reduction in ("one_mean", "two_means")
    )
    assert one.total.item() == pytest.approx((99 * two.visible.item() + 98 * two.masked.item()) / 197, rel=1e-5)


def test_cosine_of_known_angles():
    target = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [1, 0]]])
    prediction = Prediction(
        torch.tensor([[[3.0, 0]]]), torch.tensor([[[0.0, 2], [-1, 0]]]), torch.tensor([[[1.0, 3**0.5]]])
    )
    visible, masked = torch.tensor([[0, 2]]), torch.tensor([[1]])
    terms = alignment_loss(
        prediction, target, visible, masked=masked, settings=LossSettings(), weights=torch.ones(1), has_class_token=True
    )
    assert terms.visible.item() == pytest.approx((0 + 1 + 2) / 3)
    assert terms.masked.item() == pytest.approx(0.5)


def test_cosine_ignores_norms_and_the_others_do_not():
    prediction, target, visible, masked = case()
    for kind in KINDS:
        once, twice = (
            alignment_loss(
                prediction,
                scale * target,
                visible,
                masked=masked,
                settings=LossSettings(kind=kind),
                weights=torch.ones(3),
                has_class_token=True,
            )
            for scale in (1, 2)
        )
        assert (once.total.item() == pytest.approx(twice.total.item(), rel=1e-5)) is (kind == "cosine")


@settings(deadline=None, max_examples=60)
@given(
    real=st.integers(1, 4),
    padding=st.integers(0, 3),
    kind=st.sampled_from(KINDS),
    reduction=st.sampled_from(["two_means", "one_mean"]),
    class_token=st.booleans(),
    fill=st.sampled_from([0.0, 7.0]),
    seed=st.integers(0, 1000),
)
def test_padding_changes_neither_loss_nor_gradient(real, padding, kind, reduction, class_token, fill, seed):
    prediction, target, visible, masked = case(samples=real + padding, seed=seed)
    target[real:] = fill
    if not class_token:
        target = target[:, 1:]
    loss = LossSettings(kind=kind, reduction=reduction)
    mean_token = torch.full((5,), 0.1)

    def run(samples: int):
        parts = [tokens[:samples].clone().requires_grad_() for tokens in predicted(prediction)]
        weights = torch.cat([torch.ones(real), torch.zeros(padding)])[:samples]
        inputs = (Prediction(*parts), target[:samples], visible[:samples], masked[:samples])
        terms = alignment_loss(*inputs, settings=loss, weights=weights, has_class_token=class_token)
        terms.total.backward()
        centred = centred_cosine(*inputs, mean=mean_token, weights=weights, has_class_token=class_token)
        return terms, centred, [torch.zeros(1) if part.grad is None else part.grad for part in parts]

    padded, padded_centred, padded_gradients = run(real + padding)
    plain, plain_centred, gradients = run(real)
    for name in ("total", "visible", "masked"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    torch.testing.assert_close(padded_centred, plain_centred)
    for with_padding, without in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(with_padding[: len(without)], without)
        assert not with_padding[len(without) :].any()


def test_padding_that_is_not_finite_leaves_the_loss_finite():
    prediction, target, visible, masked = case()
    weights = torch.tensor([1.0, 1.0, 0.0])
    wanted = alignment_loss(
        prediction, target, visible, masked=masked, settings=LossSettings(), weights=weights, has_class_token=True
    )
    target[2] = float("nan")
    terms = alignment_loss(
        prediction, target, visible, masked=masked, settings=LossSettings(), weights=weights, has_class_token=True
    )
    torch.testing.assert_close(terms.total, wanted.total)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_padding_alone_gives_zero(kind):
    prediction, target, visible, masked = case()
    terms = alignment_loss(
        prediction,
        0 * target,
        visible,
        masked=masked,
        settings=LossSettings(kind=kind),
        weights=torch.zeros(3),
        has_class_token=True,
    )
    assert terms.total.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_target_of_zeros_gives_no_nan(kind):
    prediction, target, visible, masked = case()
    parts = [tokens.requires_grad_() for tokens in predicted(prediction)]
    terms = alignment_loss(
        Prediction(*parts),
        0 * target,
        visible,
        masked=masked,
        settings=LossSettings(kind=kind),
        weights=torch.ones(3),
        has_class_token=True,
    )
    terms.total.backward()
    assert terms.total.isfinite()
    assert all(part.grad.isfinite().all() for part in parts)


def test_narrow_predictions_are_compared_in_fp32():
    prediction, target, visible, masked = case(dim=64)
    narrow = Prediction(*(tokens.bfloat16() for tokens in predicted(prediction)))
    wide = Prediction(*(tokens.float() for tokens in predicted(narrow)))
    with torch.autocast("cpu", torch.bfloat16):
        terms = alignment_loss(
            narrow, target, visible, masked=masked, settings=LossSettings(), weights=torch.ones(3), has_class_token=True
        )
    assert terms.total.dtype == torch.float32
    wanted = alignment_loss(
        wide, target, visible, masked=masked, settings=LossSettings(), weights=torch.ones(3), has_class_token=True
    )
    torch.testing.assert_close(terms.total, wanted.total)


def test_without_a_regressor_the_masked_term_is_zero():
    prediction, target, visible, masked = case()
    alone = Prediction(prediction.class_token, prediction.visible, None)
    for reduction in ("two_means", "one_mean"):
        loss = LossSettings(reduction=reduction, visible=2)
        terms = alignment_loss(
            alone, target, visible, masked=masked, settings=loss, weights=torch.ones(3), has_class_token=True
        )
        assert terms.masked.item() == 0
        assert terms.total.item() == pytest.approx(2 * terms.visible.item())
    seen, hidden = centred_cosine(
        alone, target, visible, masked=masked, mean=torch.zeros(5), weights=torch.ones(3), has_class_token=True
    )
    assert hidden.item() == 0
    assert seen.item() != 0


def test_centred_cosine_is_of_unit_tokens_about_the_mean():
    prediction, target, visible, masked = case()
    about = torch.randn(5, generator=torch.Generator().manual_seed(9)) / 3
    seen, hidden = centred_cosine(
        prediction, target, visible, masked=masked, mean=about, weights=torch.ones(3), has_class_token=True
    )
    patches = F.normalize(target[:, 1:], dim=-1) - about

    def wanted(tokens, indices):
        scores = []
        for sample in range(3):
            for index, patch in enumerate(indices[sample].tolist()):
                got = tokens[sample, index] / tokens[sample, index].norm() - about
                true = patches[sample, patch]
                scores.append((got @ true / got.norm() / true.norm()).item())
        return mean(scores)

    assert seen.item() == pytest.approx(wanted(prediction.visible, visible), rel=1e-4)
    assert hidden.item() == pytest.approx(wanted(prediction.masked, masked), rel=1e-4)


def test_centred_cosine_tells_a_copy_from_a_constant():
    """A collapsed student has a high raw cosine if tokens share a mean, but a centred cosine of 0."""
    generator = torch.Generator().manual_seed(0)
    target = F.normalize(torch.randn(8, 17, 32, generator=generator) + 0.8, dim=-1)
    about = target[:, 1:].mean(dim=(0, 1))
    visible, masked = torch.arange(10).expand(8, -1), torch.arange(10, 16).expand(8, -1)
    constant = about.expand(8, 16, -1)
    copy = 3 * target[:, 1:]
    scores = {}
    for name, tokens in (("constant", constant), ("copy", copy)):
        prediction = Prediction(target[:, :1], tokens[:, :10], tokens[:, 10:])
        raw = (
            1
            - alignment_loss(
                prediction,
                target,
                visible,
                masked=masked,
                settings=LossSettings(),
                weights=torch.ones(8),
                has_class_token=True,
            ).masked
        )
        centred = centred_cosine(
            prediction, target, visible, masked=masked, mean=about, weights=torch.ones(8), has_class_token=True
        )[1]
        scores[name] = (raw.item(), centred.item())
    assert scores["copy"] == pytest.approx((1, 1), abs=1e-5)
    assert scores["constant"][0] > 0.5
    assert scores["constant"][1] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("group", ["visible", "masked", "none"])
@pytest.mark.parametrize("reduction", ["two_means", "one_mean"])
def test_the_class_token_counts_where_it_is_said_to(group, reduction):
    prediction, target, visible, masked = case()
    found = alignment_loss(
        prediction,
        target,
        visible,
        masked=masked,
        settings=LossSettings(class_token=group, reduction=reduction, masked=3.0),
        weights=torch.ones(3),
        has_class_token=True,
    )
    seen, hidden = by_hand(prediction, target[:, 1:], visible, masked, "cosine", class_token=False)
    own = [1 - F.cosine_similarity(prediction.class_token[i, 0], target[i, 0], dim=0).item() for i in range(3)]
    seen, hidden = (part + own if name == group else part for name, part in (("visible", seen), ("masked", hidden)))
    share = (1, 1) if reduction == "two_means" else [len(part) / len(seen + hidden) for part in (seen, hidden)]
    torch.testing.assert_close(found.visible.item(), mean(seen), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.masked.item(), mean(hidden), rtol=1e-5, atol=1e-5)
    wanted = share[0] * mean(seen) + 3 * share[1] * mean(hidden)
    torch.testing.assert_close(found.total.item(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "trained"),
    [
        ({}, True),
        ({"visible": 0}, False),
        ({"class_token": "none"}, False),
        ({"class_token": "masked"}, True),
        ({"class_token": "masked", "masked": 0}, False),
        ({"class_token": "masked", "visible": 0}, True),
        ({"target": "pixels"}, False),
    ],
)
def test_when_the_class_token_is_trained(loss, trained):
    assert LossSettings.model_validate(loss).aligns_class_token is trained
