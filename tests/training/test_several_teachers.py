"""Students of two teachers: one of 24 dimensions with a class token, one of 16 without, but with a summary."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from typer.testing import CliRunner

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.cli import app
from cae2pipe.comparison.gathering import gather_runs
from cae2pipe.comparison.scores import read_scores
from cae2pipe.errors import DivergedError, MismatchError, SettingsError
from cae2pipe.loading.joining import join_sets, labels_of
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.method import Widths
from cae2pipe.methods.registry import BUILT_IN, build_method
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.export import export
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.replay import replay
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.metrics import read_lines, read_probes
from cae2pipe.training.objective import make_objective
from cae2pipe.training.standardisation import equal_variance_rotation, standardisation_of, stored_standardisation
from cae2pipe.training.step import cached, forward
from cae2pipe.training.student import load_method, load_student, preview_latents, run_settings
from cae2pipe.training.target_spec import target_spec
from cae2pipe.training.telemetry import MACHINE_METRICS
from tests.conftest import edit_manifest, write_photos
from tests.pooling_teacher import extract_pooling
from tests.ranks import launch
from tests.training.rank import train

LABELS = ["wide", "tiny"]


@pytest.fixture(scope="module")
def roots(wide_root, summary_root) -> list[Path]:
    return [wide_root, summary_root]


@pytest.fixture(scope="module")
def sets(roots) -> list[TargetSet]:
    return [TargetSet(root) for root in roots]


@pytest.fixture(scope="module")
def both(roots, pretrain_settings, tmp_path_factory) -> Path:
    """A finished run of both teachers. Read-only."""
    out = tmp_path_factory.mktemp("both") / "run"
    pretrain(roots, out, pretrain_settings(), report=Silent())
    return out


def figures(root: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in MACHINE_METRICS}
        for line in read_lines(root / "metrics.jsonl")
    ]


def made(sets, chosen):
    """The objective, its model, and the first batch."""
    torch.manual_seed(0)
    spec = target_spec(chosen, sets[0], sets[1:])
    model = build_method(chosen.method, chosen.model, spec.dim, spec.summary)
    objective = make_objective(model, sets[0], chosen, others=sets[1:]).train()
    columns = model.drop_columns + objective.columns
    plan = make_plan(sets[0], sorted(sets[0].stores), chosen, drop_columns=columns, others=sets[1:])
    return objective, next(iter(load_batches(plan, 0, 0)))


def views_of(targets: TargetSet, batch) -> list:
    """The stored views of a batch, read through the target set alone."""
    by_name = {(view.key, view.view): view for view in targets}
    return [by_name[key, view] for key, view in zip(batch.keys, batch.views, strict=True)]


def distance(kind: str, got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(got, wanted, dim=-1)
    return (got - wanted).square().mean(dim=-1)


@pytest.mark.parametrize(
    ("method", "kind"), [*((name, "cosine") for name in sorted(BUILT_IN)), ("cae", "mse"), ("fd", "mse")]
)
def test_loss_and_gradients_equal_a_plain_reference(sets, pretrain_settings, method, kind):
    weights = {"wide": 0.5, "tiny": 2.0}
    mask = {"strategy": "attention"} if method == "milan" else {}
    chosen = pretrain_settings(method=method, loss={"kind": kind, "teachers": weights}, mask=mask)
    objective, batch = made(sets, chosen)
    terms = forward(objective, batch, cached(batch))
    terms[0].backward()
    gradients = [p.grad.clone() for p in objective.model.parameters() if p.grad is not None]
    objective.zero_grad(set_to_none=True)

    prediction = objective.model(objective.normalise(batch.pixels), batch.visible, batch.masked, batch.drop)
    total, first = 0, 0
    for targets, name in zip(sets, LABELS, strict=True):
        views = views_of(targets, batch)
        tokens = torch.from_numpy(np.stack([view.tokens for view in views]))
        dim, own = tokens.shape[-1], targets.teacher.class_token
        if kind == "mse":
            mean, matrix = stored_standardisation(targets)
            norms = torch.from_numpy(np.stack([view.norms for view in views]))
            tokens = (tokens * norms.unsqueeze(-1) - mean) @ matrix
        patches = tokens[:, int(own) :]
        near = [
            distance(kind, part[..., first : first + dim], patches.gather(1, index.unsqueeze(-1).expand(-1, -1, dim)))
            for part, index in ((prediction.visible, batch.visible), (prediction.masked, batch.masked))
        ]
        if own:
            extra = distance(kind, prediction.class_token[..., first : first + dim], tokens[:, :1])
        else:
            summary = torch.from_numpy(np.stack([view.summary for view in views]))
            if kind == "mse":
                mean, matrix = stored_standardisation(targets, "summary")
                summary = (summary * torch.tensor([[view.summary_norm] for view in views]) - mean) @ matrix
            extra = distance(kind, prediction.summary, summary.unsqueeze(1))
        near[0] = torch.cat([near[0], extra], dim=1)
        loss = sum(part.mean() for part in near)
        assert terms[objective.terms.index(f"loss/{name}")].item() == pytest.approx(loss.item(), rel=1e-5)
        total, first = total + weights[name] * loss, first + dim
    if prediction.extra is not None:
        total = total + prediction.extra.mean()
    assert terms[0].item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    plain = [p.grad for p in objective.model.parameters() if p.grad is not None]
    for one, other in zip(gradients, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_agrees_to_the_bit(roots, both, pretrain_settings, tmp_path):
    """Also with another number of workers; ``tests/faults/test_kills.py`` kills one."""
    pretrain(roots, tmp_path / "run", pretrain_settings(stop_after=3), report=Silent())
    pretrain(roots, tmp_path / "run", pretrain_settings(speed={"workers": 2}), report=Silent())
    assert figures(tmp_path / "run") == figures(both)
    names = ("encoder.safetensors", "manifest.json")
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == [(both / name).read_bytes() for name in names]


@pytest.mark.parametrize("over", [{}, {"parallel": "fsdp", "accumulation": 2}])
def test_two_processes_train_as_one_does(roots, pretrain_settings, tmp_path, over, both):
    chosen = pretrain_settings(speed=over).model_dump(mode="json")
    job = {"targets": [str(root) for root in roots], "out": str(tmp_path / "run"), "settings": chosen}
    done = launch(train, job)
    assert done.codes == [0, 0], done.stderr
    for one, other in zip(figures(tmp_path / "run"), figures(both), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_dropping_keeps_the_teacher_with_the_largest_loss(sets, pretrain_settings):
    objective, batch = made(sets, pretrain_settings(loss={"drop_teachers": 1.0}))
    terms = dict(zip(objective.terms, forward(objective, batch, cached(batch)).tolist(), strict=True))
    each = []
    for row in range(len(batch.keys)):
        own = made_of_row(objective, batch, row)
        each.append(max(own["loss/wide"], own["loss/tiny"]))
    assert terms["loss"] == pytest.approx(sum(each) / batch.real, rel=1e-4)
    assert terms["loss"] < terms["loss/wide"] + terms["loss/tiny"]


def made_of_row(objective, batch, row: int) -> dict[str, float]:
    """The terms of one image alone, as a batch of one."""
    from dataclasses import replace

    from cae2pipe.loading.batches import split

    latents = objective.decoded_targets(cached(batch))
    part = replace(split(replace(batch, arrays={}), {}, len(batch.keys))[row], real=1)
    own = {name: tensor[row : row + 1] for name, tensor in latents.items()}
    with torch.no_grad():
        return dict(zip(objective.terms, forward(objective, part, own).tolist(), strict=True))


@given(strategies.lists(strategies.floats(1e-3, 1e3), min_size=1, max_size=40))
@settings(max_examples=60)
def test_a_rotation_gives_all_dimensions_the_same_variance(variances):
    variances = torch.tensor(variances, dtype=torch.float64)
    rotation = equal_variance_rotation(variances)
    assert torch.allclose(rotation.T @ rotation, torch.eye(len(variances), dtype=torch.float64), atol=1e-9)
    rotated = (rotation.T * variances) @ rotation
    assert torch.allclose(rotated.diag(), variances.mean().expand(len(variances)), rtol=1e-6)


def test_standardised_tokens_have_no_mean_and_variance_one(sets):
    tokens = torch.from_numpy(np.stack([sets[0][index].tokens for index in range(64)]))
    mean, matrix = standardisation_of(tokens)
    flat = ((tokens - mean) @ matrix).flatten(0, 1)
    assert flat.mean(dim=0).abs().max() < 1e-3
    assert torch.allclose(flat.square().mean(dim=0), torch.ones(24), atol=1e-3)


def test_a_failed_step_is_replayed(roots, pretrain_settings, tmp_path):
    chosen = pretrain_settings(optimizer={"lr": 1e30}, epochs=3)
    with pytest.raises(DivergedError):
        pretrain(roots, tmp_path / "run", chosen, report=Silent())
    (record,) = (tmp_path / "run" / "failures").iterdir()
    again = replay(record, device="cpu")
    assert again["terms"].keys() >= {"loss", "loss/wide", "loss/tiny"}
    assert str(again["terms"]) == str({name: again["recorded"][name] for name in again["terms"]})


def test_one_graph_serves_all_steps(roots, pretrain_settings, tmp_path, graphs):
    chosen = pretrain_settings(speed={"compile": True}, data={"last_batch": "drop"})
    pretrain(roots, tmp_path / "run", chosen, report=Silent())
    assert graphs.frame_count == 1


def test_the_manifest_names_all_teachers(both, sets):
    facts = json.loads((both / "manifest.json").read_text())
    assert [teacher["label"] for teacher in facts["teachers"]] == labels_of(sets) == LABELS
    assert [teacher["dim"] for teacher in facts["teachers"]] == [24, 16]
    assert facts["teacher"]["name"] == facts["teachers"][0]["name"]
    assert facts["identity"]["teachers"] == [sets[1].artifact.fingerprint]


def test_metrics_by_teacher(both):
    for line in figures(both):
        assert line["loss"] == pytest.approx(line["loss/wide"] + line["loss/tiny"], rel=1e-5)


def test_sets_that_hold_less_narrow_the_run(roots, tmp_path, pretrain_settings):
    other = Path(shutil.copytree(roots[1], tmp_path / "other"))
    units = json.loads((other / "manifest.json").read_text())["units"]
    edit_manifest(other, units={name: unit for name, unit in units.items() if not name.startswith("v01")})
    joined = join_sets([TargetSet(roots[0]), TargetSet(other)])
    assert joined.main.views == 1
    assert "that all target sets have" in joined.note
    assert len(joined.main) == len(joined.others[0]) == 150
    report = Silent()
    pretrain([roots[0], other], tmp_path / "run", pretrain_settings(stop_after=1), report=report)
    assert any(joined.note in line for line in report.lines)


def test_a_set_that_has_changed_is_refused_on_resuming(roots, tmp_path, pretrain_settings):
    other = Path(shutil.copytree(roots[1], tmp_path / "other"))
    pretrain([roots[0], other], tmp_path / "run", pretrain_settings(stop_after=2), report=Silent())
    units = json.loads((other / "manifest.json").read_text())["units"]
    edit_manifest(other, units={name: unit for name, unit in units.items() if not name.startswith("v01")})
    with pytest.raises(MismatchError, match="is no longer in") as caught:
        pretrain([roots[0], other], tmp_path / "run", pretrain_settings(), report=Silent())
    assert caught.value.where == str(other)


def test_other_sets_and_another_order_are_refused_on_resuming(roots, both, pretrain_settings, tmp_path):
    alone, settings = tmp_path / "alone", pretrain_settings(stop_after=1)
    pretrain(roots[0], alone, settings, report=Silent())
    foreign = edited(roots[1], tmp_path / "foreign", {"settings": {"codec": {"fidelity": 0.75}}})
    begun, right = (
        "this run was begun with the targets of wide",
        f"`cae2pipe pretrain {roots[0]} {roots[1]} {both}` with the same",
    )
    names = [TargetSet(root).artifact.fingerprint[:8] for root in (roots[1], foreign)]
    other = f"this run was begun with other target sets: {names[0]} of tiny, in place of {names[1]}"
    for run, sets, said, fix in (
        (both, roots[::-1], f"{begun}, tiny, in this order", right),
        (both, roots[:1], f"{begun}, tiny, and those of tiny are missing", "give all of these target sets"),
        (both, [roots[0], foreign], f"{other} in {foreign}", "give the target sets that"),
        (alone, roots, f"{begun} alone, without {roots[1]}", f"`cae2pipe pretrain {roots[0]} {alone}` with the same"),
    ):
        with pytest.raises(MismatchError) as caught:
            pretrain(sets, run, settings, report=Silent())
        assert caught.value.what == said
        assert caught.value.fix.startswith(fix)
        assert caught.value.where == str(run)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        # Images that are kept once may be equal where the views that are cut from them are not.
        ({"settings": {"view": {"scale": [0.5, 1.0]}}}, "their views differ: view.scale"),
        ({"settings": {"seed": 5}}, "their views differ: seed"),
    ],
)
def test_views_that_are_cut_in_another_way_are_not_joined(roots, tmp_path, change, match):
    with pytest.raises(MismatchError, match=match):
        join_sets([TargetSet(roots[0]), TargetSet(edited(roots[1], tmp_path / "other", change))])


def test_another_name_of_a_teacher_does_not_make_it_another(roots, tmp_path):
    named = {"teacher": {"name": "alias"}, "settings": {"teacher": {"name": "alias", "pretrained": "tag"}}}
    with pytest.raises(SettingsError, match="a teacher twice"):
        join_sets([TargetSet(roots[1]), TargetSet(edited(roots[1], tmp_path / "other", named))])


def test_a_summary_is_asked_of_the_teachers_that_have_one(roots, tmp_path, pretrain_settings):
    pretrain(roots, tmp_path / "run", pretrain_settings(loss={"summary": True}, stop_after=1), report=Silent())
    assert len(figures(tmp_path / "run")) == 1


def test_widths_can_be_copied():
    assert copy.deepcopy(Widths([24, 16])).parts == (24, 16)


def edited(root: Path, out: Path, change: dict) -> Path:
    """A copy of a set with other values in its identity."""

    def merged(old, new):
        return (
            {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}
            if isinstance(new, dict)
            else new
        )

    shutil.copytree(root, out)
    identity = merged(json.loads((out / "manifest.json").read_text())["identity"], change)
    edit_manifest(out, identity=identity, fingerprint=fingerprint(identity))
    return out


def test_what_does_not_fit_is_refused(roots, stored_root, target_root, int8_root, tmp_path, pretrain_settings):
    def refused(given, match: str, error=SettingsError, **over) -> None:
        with pytest.raises(error, match=match) as caught:
            pretrain(given, tmp_path / "run", pretrain_settings(**over), report=Silent())
        assert caught.value.fix
        assert not (tmp_path / "run").exists()

    refused([target_root, int8_root], "a teacher twice")
    refused([stored_root, roots[0]], "no views in common: their views differ: view.pixels", MismatchError)
    refused(roots, "is one file", targets="online", teacher_weights=str(tmp_path / "weights.safetensors"))
    refused(roots, "pixel targets", loss={"target": "pixels", "kind": "mse"})
    refused(roots, "no teacher of these target sets", loss={"teachers": {"dino": 1.0}})
    refused(roots[0], "for several teachers", loss={"drop_teachers": 0.5})
    with pytest.raises(SettingsError, match="comes last"):
        pretrain([tmp_path / "run", roots[0]], roots[1], pretrain_settings(), report=Silent())
    with pytest.raises(SettingsError, match="the folder of the run is missing"):
        pretrain(roots[:1], roots[1], pretrain_settings(), report=Silent())


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_pictures_take_the_head_of_the_teacher_of_the_set(roots, sets, pretrain_settings, tmp_path, kind):
    run = tmp_path / "run"
    pretrain(roots, run, pretrain_settings(loss={"kind": kind}, stop_after=3), report=Silent())
    objective, batch = made(sets, run_settings(run))
    weights = torch.load(run / "checkpoints" / "step-00000003.pt", weights_only=True)["model"]
    objective.model.load_state_dict(weights)
    given = objective.normalise(batch.pixels), batch.visible, batch.masked
    whole = objective.model.eval()(*given)
    first = 0
    for targets in sets:
        model, _ = load_student(run, targets, Silent())
        got, dim = model(*given).masked, targets.teacher.dim
        if kind == "mse":
            mean, matrix = stored_standardisation(targets)
            got = (got - mean) @ matrix
        assert torch.allclose(got, whole.masked[..., first : first + dim], atol=1e-3)
        first += dim
    assert list(inspect_folder(run)["teachers"]) == LABELS
    if kind == "mse":
        with pytest.raises(SettingsError, match="standardised latents"):
            load_method(run, 24, Silent())


def test_a_model_card_names_all_teachers_and_licences(both, tmp_path):
    export(str(both), tmp_path / "timm", "timm", scores=[])
    text = (tmp_path / "timm" / "README.md").read_text()
    for label in LABELS:
        assert f"| teacher {label} |" in text
    assert text.count("licence unknown") == 2


def test_a_report_shows_the_latents_of_every_set_that_it_is_given(both, roots, tmp_path):
    sets = [part for root in roots for part in ("--targets", str(root))]
    told = CliRunner().invoke(app, ["report", str(both), *sets, "--out", str(tmp_path), "--device", "cpu"])
    assert told.exit_code == 0, told.output
    page = (tmp_path / "report.html").read_text()
    shown = [page.count(f"Latents of the teacher {label} as colours") for label in LABELS]
    assert shown == [shown[0]] * len(LABELS) != [0] * len(LABELS)
    told = CliRunner().invoke(app, ["report", str(both), *sets[:2], *sets[:2], "--out", str(tmp_path)])
    assert told.exit_code == 2
    assert "a teacher twice" in told.output


def test_a_report_tells_runs_of_other_teachers_apart(both, roots, pretrain_settings, tmp_path):
    pretrain(roots[0], tmp_path / "alone", pretrain_settings(stop_after=1), report=Silent())
    comparison = gather_runs([both, tmp_path / "alone"], read_scores([]), [])
    assert len(comparison.rows) == 2
    # In the manifest of a run of one teacher nothing says that there could be more.
    assert "teachers" not in (tmp_path / "alone" / "manifest.json").read_text()


@pytest.fixture(scope="module")
def held_out(wide_root, extract_settings, tmp_path_factory) -> list[Path]:
    """Sets of both teachers over other images."""
    folder = tmp_path_factory.mktemp("held")
    images = write_photos(folder / "images", classes=1, each=20, seed=9)
    wide = {"name": "wide", "weights": str(wide_root.parent / "wide.safetensors"), "embed_dim": 24}
    extract_targets(images, folder / "wide", extract_settings(teacher=wide, views=1), report=Silent())
    return [folder / "wide", extract_pooling(images, folder / "tiny", extract_settings(views=1))]


def test_held_out_figures_by_teacher(roots, both, held_out, pretrain_settings, tmp_path):
    out, report = tmp_path / "run", Silent()
    loss = {"teachers": {"tiny": 2.0}, "drop_teachers": 0.5}
    given = {"targets": [str(root) for root in reversed(held_out)]}
    pretrain(roots, out, pretrain_settings(probe=given, loss=loss), report=report)
    (last,) = read_probes(out / "probe.jsonl")
    by_label = [last[f"held_out_loss/{label}"] for label in LABELS]
    assert last["held_out_loss"] == pytest.approx(by_label[0] + 2 * by_label[1], rel=1e-5)
    assert any(f"held-out loss of wide {by_label[0]:.4f}" in line for line in report.lines)
    for label, root, trained_on in zip(LABELS, held_out, roots, strict=True):
        # Each view by itself, by the code that draws the report's pictures.
        targets = TargetSet(root)
        model, chosen = load_student(out, targets, Silent())
        centred = SimpleNamespace(teacher=targets.teacher, mean=TargetSet(trained_on).mean)
        views = [targets[index] for index in range(len(targets))]
        previews = preview_latents(model, chosen, centred, views=views, device=torch.device("cpu"))
        wanted = sum(preview.cosine for preview in previews) / len(previews)
        assert last[f"held_out_centred_cosine_masked/{label}"] == pytest.approx(wanted, abs=1e-4)


def test_held_out_latents_are_standardised_as_those_of_training(sets, held_out, pretrain_settings):
    chosen = pretrain_settings(loss={"kind": "mse"})
    spec = target_spec(chosen, sets[0], sets[1:])
    model = build_method(chosen.method, chosen.model, spec.dim, spec.summary)
    read = [TargetSet(root) for root in held_out]
    objective = make_objective(model, sets[0], chosen, others=sets[1:], read=read)
    for part, trained_on, held in zip(objective.parts, sets, read, strict=True):
        assert torch.equal(part.tokens_matrix, stored_standardisation(trained_on).matrix)
        assert part.codec is held.layout.codec


def test_held_out_sets_that_do_not_fit_are_refused(roots, held_out, target_root, pretrain_settings, tmp_path):
    def refused(given: list[Path], match: str) -> None:
        chosen = pretrain_settings(probe={"targets": [str(root) for root in given]})
        with pytest.raises(SettingsError, match=match) as caught:
            pretrain(roots, tmp_path / "run", chosen, report=Silent())
        assert caught.value.fix
        assert not (tmp_path / "run").exists()

    refused(held_out[:1], "there are no held-out targets of tiny")
    refused([*held_out, target_root], "teacher mismatch: trained on wide, pooling, held-out targets of tiny")
    refused([held_out[0], roots[1]], "nothing is held out")
    refused([held_out[0], *held_out], "a teacher twice: wide")
