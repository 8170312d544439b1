"""The demo's parts on the tiny target set, and the order of its commands with the slow stages replaced."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cae2pipe.demo import run as demo
from cae2pipe.demo.measures import MEASURES, rows
from cae2pipe.demo.report import title
from cae2pipe.demo.student import MeanStudent, mean_over_views, previews_of
from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.student import load_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(target_root, pretrain_settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    return out


@pytest.fixture(scope="module")
def targets(target_root) -> TargetSet:
    return TargetSet(target_root)


def test_the_mean_target_has_the_loss_it_should(targets, pretrain_settings):
    means = mean_over_views(
        MeanStudent(targets.mean), targets, pretrain_settings(mask={"strategy": "random"}), device=CPU
    )
    tokens = []
    for name in targets.stores:
        reader = targets.reader(name)
        for block in range(reader.blocks):
            arrays = {
                key: torch.from_numpy(value.view(np.int16)) for key, value in reader.arrays(block, ["symbols"]).items()
            }
            tokens.append(targets.layout.codec.decode(arrays))
    distance = 1 - torch.cosine_similarity(torch.cat(tokens), targets.mean, dim=-1).mean()
    # Visible and masked are random halves of all tokens, so each mean is near the mean over all.
    assert means["loss"] == pytest.approx(2 * float(distance), rel=0.05)
    assert abs(means["centred_cosine_masked"]) < 0.2


def test_the_student_loaded_is_the_one_trained(run, targets):
    model, settings = load_student(run, targets, Silent())
    assert not model.training
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    means = mean_over_views(model, targets, settings, device=CPU)
    assert means["loss"] == pytest.approx(last["loss"], rel=0.1)
    assert means["loss"] == mean_over_views(model, targets, settings, device=CPU)["loss"]


def test_a_run_without_a_checkpoint(run, targets, tmp_path):
    (tmp_path / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    with pytest.raises(DamageError, match="checkpoint"):
        load_student(tmp_path, targets, Silent())


def test_previews(run, targets):
    model, settings = load_student(run, targets, Silent())
    keys = ["class1+image007", "class0+image003"]
    previews = previews_of(model, targets, settings, keys=keys, device=CPU)
    assert [preview.key for preview in previews] == keys
    for preview in previews:
        assert preview.mask.sum() == settings.masked_patches
        assert preview.view.shape == (32, 32, 3)
        assert preview.teacher.shape == preview.student.shape == (16, 16)
        np.testing.assert_allclose(np.linalg.norm(preview.student, axis=1), 1, atol=1e-5)
        mean = targets.mean.numpy()
        a, b = (tokens[preview.mask.ravel()] - mean for tokens in (preview.student, preview.teacher))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert preview.cosine == pytest.approx(cosine.mean(), abs=1e-4)


def test_the_tile_is_shown_with_what_is_stored_of_it(targets, photos):
    stored = demo.stored_tile(targets, photos, "class2/image011")
    assert stored.key == "class2+image011"
    assert stored.picture.shape == (stored.height, stored.width, 3)


@pytest.mark.parametrize(("rows", "patch"), [(14, []), (16, ["--set", "model.patch_size=14"])])
def test_the_student_takes_the_teachers_grid(rows, patch):
    class Set:
        view_size = 224
        teacher = type("Teacher", (), {"rows": rows})

    assert demo.student_options(Set()) == patch


def test_titles():
    assert title("motorcycle_left+03") == "motorcycle left, tile 3"


def test_loss_figures():
    lines = [{"epoch": e, "loss": 4.0 - e - 0.5 * s} for e in range(2) for s in range(2)]
    assert demo.loss_figures(lines) == {"loss_first": 4.0, "loss_last": 2.75}


def test_an_equal_result_keeps_its_seconds(tmp_path):
    path = tmp_path / "result.json"
    first = demo.write_result(path, {"images": 3}, 100.0)
    assert demo.write_result(path, {"images": 3}, 5.0) == first == {"images": 3, "seconds": 100.0}
    assert demo.write_result(path, {"images": 4}, 5.0)["seconds"] == 5.0


def test_the_demo_says_what_it_runs_and_writes_everything(
    tmp_path, monkeypatch, photos, extract_settings, pretrain_settings
):
    """Every stage runs, on the tests' tiny images, teacher and student."""
    out = tmp_path / "out"

    def cut(folder, seed, report):
        for split in ("train", "val"):
            (folder / split).parent.mkdir(exist_ok=True, parents=True)
            if not (folder / split).exists():
                (folder / split).symlink_to(photos)

    def settings_of(kind, stage, preset, overrides=(), values=None):
        if stage == "extract":
            assert preset == "tiny-teacher"
            return extract_settings(views=values["views"])
        return pretrain_settings(optimizer={"lr": 0.1}) if stage == "pretrain" else None

    scores = iter([0.25, 0.5, 0.75] * 3)
    asked = []

    def knn(kind, encoder, data, **_):
        asked.append(encoder)
        return {"top1": next(scores)}

    @contextmanager
    def quiet(title):
        yield Silent()

    monkeypatch.setattr(demo, "cut_tiles", cut)
    monkeypatch.setattr(demo, "load", settings_of)
    monkeypatch.setattr(demo, "evaluate", knn)
    monkeypatch.setattr(demo, "student_options", lambda targets: [])
    monkeypatch.setattr(demo, "STORED", ("class0/image001",))
    monkeypatch.setattr(demo, "PREDICTED", ("class0/image001", "class1/image002", "class2/image003"))
    monkeypatch.setattr(demo, "VIEWS", 2)
    said: list[str] = []
    result = demo.run_demo(out, "tiny-teacher", "cpu", say=said.append, reports=quiet)
    text = "\n".join(said)
    assert (
        f"$ cae2pipe extract-targets {out}/images/train {out}/targets --config tiny-teacher --views 2 --device cpu"
        in text
    )
    assert f"$ cae2pipe pretrain {out}/targets {out}/run --config demo --device cpu" in text
    assert f"$ cae2pipe evaluate knn random:{out}/run {out}/images {out}/scores/random --device cpu" in text
    assert asked == [f"random:{out}/run", f"{out}/run", "teacher:tiny-teacher"]
    assert json.loads((out / "result.json").read_text()) == result
    assert set(result) == {measure.key for measure in MEASURES}
    assert (result["images"], result["views"]) == (150, 2)
    assert (result["knn_random"], result["knn_pretrained"], result["knn_teacher"]) == (0.25, 0.5, 0.75)
    assert result["loss_last"] < 0.8 * result["loss_first"]
    page = (out / "report.html").read_text()
    assert "class1, image002" in page
    assert "extract-targets imagenet/train" in page
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert demo.run_demo(out, "tiny-teacher", "cpu", say=said.append, reports=quiet) == result
    assert (out / "report.html").read_text() == page
    # Interrupted before the report: the earlier command's time is not known.
    (out / "result.json").unlink()
    resumed = demo.run_demo(out, "tiny-teacher", "cpu", say=said.append, reports=quiet)
    assert resumed == {name: value for name, value in result.items() if name != "seconds"}
    assert "From the first command" in page
    assert "From the first command" not in (out / "report.html").read_text()
    assert "seconds" not in {row["measure"] for row in rows(resumed)}
