"""The teacher's summary as a target of the student's class token, where the teacher has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.pretrain import LossSettings
from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.encoders import class_token_trained
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.loading.target_batches import TargetBatches
from cae2pipe.methods.registry import METHODS, build_method
from cae2pipe.models.layers import gather_tokens
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.replay import replay
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.checkpoint import checkpoints
from cae2pipe.training.fit import check_fit
from cae2pipe.training.objective import compile_objective, make_objective
from cae2pipe.training.online import OnlineLatents
from cae2pipe.training.step import cached, forward
from cae2pipe.training.target_spec import target_spec
from tests.pooling_teacher import WIDTH, pooling_teacher

LOSSES = [
    {"kind": "cosine"},
    {"kind": "mse", "reduction": "one_mean"},
    {"kind": "smooth_l1", "target": "layer_norm"},
    {"kind": "cosine", "summary": False},
]


@pytest.fixture(scope="module")
def targets(summary_root) -> TargetSet:
    return TargetSet(summary_root)


def parts_of(targets, settings):
    """The objective of a run on the set, and its first two batches."""
    torch.manual_seed(0)
    spec = target_spec(settings, targets)
    model = build_method(settings.method, settings.model, spec.dim, spec.summary)
    plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=model.drop_columns)
    batches = load_batches(plan, 3, 0)  # the last batch of the epoch is padded, then the first of the next
    return make_objective(model, targets, settings).train(), [next(batches) for _ in range(3)]


def plain_loss(model, views, batch, loss: LossSettings):
    """The loss in plain PyTorch, of the real samples of a batch, from views that TargetSet gives."""
    rows = [row for row, key in enumerate(batch.keys) if key]
    chosen = [views[batch.keys[row], batch.views[row]] for row in rows]
    tokens, norms, summary, lengths = (
        torch.from_numpy(np.stack([getattr(view, name) for view in chosen]))
        for name in ("tokens", "norms", "summary", "summary_norm")
    )
    pixels = torch.from_numpy(np.stack([view.pixels for view in chosen])).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (pixels - mean[:, None, None]) / std[:, None, None]
    visible, masked = batch.visible[rows], batch.masked[rows]
    encoded = model.bridge(model.encoder(images, visible, batch.drop[rows, : model.encoder.drop_columns]))
    predicted = model.regressor(encoded[:, 1:], visible, masked, batch.drop[rows, model.encoder.drop_columns :])
    if loss.kind != "cosine":
        tokens, summary = tokens * norms[..., None], summary * lengths[:, None].float()
    if loss.target == "layer_norm":
        tokens, summary = (F.layer_norm(target, target.shape[-1:]) for target in (tokens, summary))

    def distance(a, b):
        if loss.kind == "cosine":
            return 1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1)
        each = F.mse_loss if loss.kind == "mse" else F.smooth_l1_loss
        return each(a, b, reduction="none").mean(dim=-1)

    seen = distance(model.head(encoded[:, 1:]), gather_tokens(tokens, visible))
    hidden = distance(model.head(predicted), gather_tokens(tokens, masked))
    if loss.summary is not False:
        linear, norm = model.summary_head
        own = norm(F.linear(encoded[:, 0], linear.weight, linear.bias))
        seen = torch.cat([seen, distance(own, summary)[:, None]], dim=1)
    if loss.reduction == "one_mean":
        return torch.cat([seen, hidden], dim=1).mean()
    return seen.mean() + hidden.mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_those_of_plain_pytorch(targets, pretrain_settings, loss) -> None:
    settings = pretrain_settings(loss=loss)
    objective, batches = parts_of(targets, settings)
    views = {(view.key, view.view): view for view in targets}
    model = objective.model
    assert (model.summary_head is None) == (settings.loss.summary is False)
    for batch in batches:
        terms = forward(objective, batch, cached(batch))
        grads = torch.autograd.grad(terms[0], list(model.parameters()))
        wanted = plain_loss(model, views, batch, settings.loss)
        torch.testing.assert_close(terms[0], wanted, rtol=1e-5, atol=1e-6)
        for got, plain in zip(grads, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
            torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_its_head(targets, pretrain_settings, method) -> None:
    objective, batches = parts_of(targets, pretrain_settings(method=method))
    forward(objective, batches[1], cached(batches[1]))[0].backward()
    assert objective.model.summary_head[0].out_features == WIDTH
    assert all(float(weight.grad.abs().sum()) > 0 for weight in objective.model.summary_head.parameters())


def test_an_online_teacher_gives_the_same_target(targets, pretrain_settings) -> None:
    objective, (batch, *_) = parts_of(targets, pretrain_settings())
    stored = objective.parts[0].summary_target(cached(batch))
    live = objective.parts[0].summary_target(OnlineLatents(pooling_teacher())(batch))
    real = batch.weights > 0
    assert float(torch.cosine_similarity(stored[real], live[real], dim=-1).mean()) > 0.998


def test_one_graph_serves_all_batches(targets, pretrain_settings, graphs) -> None:
    from cae2pipe.runtime.world import World

    settings = pretrain_settings(mask={"repeat": 2})
    objective, batches = parts_of(targets, settings)
    compile_objective(objective, World(0, 1, torch.device("cpu")))
    for batch in batches:
        assert forward(objective, batch, cached(batch))[0].isfinite()
    assert graphs.frame_count == 1


def test_a_run_resumes_exactly_and_says_that_its_class_token_was_trained(
    summary_root, pretrain_settings, tmp_path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(summary_root, whole, pretrain_settings(), report=Silent())
    for stop in (3, None):
        settings = pretrain_settings(stop_after=stop, speed={"workers": 0 if stop else 2, "checkpoint_minutes": 1e-6})
        pretrain(summary_root, cut, settings, report=Silent())
    states = [torch.load(checkpoints(run / "checkpoints")[-1], weights_only=True)["model"] for run in (whole, cut)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.startswith("summary_head.") for name in states[0])
    run = RunArtifact.open(whole)
    assert run.facts["teacher"]["summary"] == WIDTH
    assert class_token_trained(run)


def test_runs_are_identified_as_before(pretrain_settings) -> None:
    assert "summary" not in fingerprinted(pretrain_settings())["loss"]
    assert fingerprinted(pretrain_settings(loss={"summary": True}))["loss"]["summary"] is True


@pytest.mark.parametrize(
    ("class_token", "stored", "setting", "more", "aligned"),
    [
        (False, True, None, {}, True),
        (True, True, None, {}, False),
        (True, True, True, {}, True),
        (False, True, False, {}, False),
        (False, False, None, {}, False),
        (False, True, None, {"visible": 0}, False),
        (False, True, None, {"target": "pixels", "kind": "mse"}, False),
    ],
)
def test_when_a_summary_is_aligned(class_token, stored, setting, more, aligned) -> None:
    loss = LossSettings(summary=setting, **more)
    assert loss.aligns_summary(class_token, stored=stored) is aligned


def test_what_cannot_be_is_refused(target_root, targets, pretrain_settings) -> None:
    with pytest.raises(SettingsError, match="no summary of tiny") as caught:
        check_fit(TargetSet(target_root), pretrain_settings(loss={"summary": True}), 1)
    assert "teacher.summary=true" in caught.value.fix
    for wrong in ({"visible": 0}, {"target": "pixels"}):
        with pytest.raises(SettingsError, match="one of the visible latents"):
            pretrain_settings(loss={"summary": True, **wrong})
    with pytest.raises(SettingsError, match="no latents 'layer-07'"):
        TargetBatches(targets, layers=[7])


def test_a_failed_step_is_replayed_with_its_summaries(summary_root, pretrain_settings, tmp_path, monkeypatch) -> None:
    from cae2pipe.errors import DivergedError
    from cae2pipe.training.alignment import Alignment

    real = Alignment.summary_target

    def broken(self, latents):
        summary = real(self, latents)
        return summary if "decoded_summary" in latents else summary.index_fill(0, torch.tensor([2]), torch.nan)

    monkeypatch.setattr(Alignment, "summary_target", broken)
    with pytest.raises(DivergedError) as caught:
        pretrain(summary_root, tmp_path / "run", pretrain_settings(), report=Silent())
    result = replay(caught.value.where, "cpu")
    assert math.isnan(result["terms"]["loss"])
    assert len(result["inputs"]) == 1


def test_batches_give_summaries_and_layers_to_other_loops(targets) -> None:
    views = {(view.key, view.view): view for view in targets}
    batches = TargetBatches(targets, batch_size=40, layout="tokens", scaled=True, summary=True, layers=[2], workers=2)
    for batch in batches:
        for row in range(0, len(batch.keys), 7):
            view = views[batch.keys[row], int(batch.views[row])]
            np.testing.assert_allclose(batch.summary[row], view.summary * view.summary_norm, rtol=1e-5, atol=1e-5)
            tokens = view.layers[2] * view.layer_norms[2][:, None]
            np.testing.assert_allclose(batch.layers[2][row], tokens, rtol=1e-4, atol=1e-4)
    plain = next(iter(TargetBatches(targets, batch_size=40)))
    assert len(plain) == 5
    maps = next(iter(TargetBatches(targets, batch_size=40, layers=[1])))
    assert maps.layers[1].shape == maps.targets.shape
