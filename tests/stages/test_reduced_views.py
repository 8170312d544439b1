"""A teacher that sees views at twice the student's resolution, with its latents on the student's grid."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cae2pipe.errors import SettingsError
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.images.kept import view_pixels
from cae2pipe.loading.device import on_device
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.loading.target_batches import TargetBatches
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.repair import repair
from cae2pipe.stages.report import report_runs
from cae2pipe.stages.verify import verify, verify_live
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.fit import check_fit
from tests.conftest import contents

STUDENT = {"image_size": 32, "patch_size": 16}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["stored", "replayed"])
def fine_root(request, photos, extract_settings, tmp_path_factory) -> Path:
    """Views of 64 pixels, which the teacher sees in an 8 x 8 grid; its latents are stored on 2 x 2. Read-only."""
    out = tmp_path_factory.mktemp("fine") / request.param
    settings = extract_settings(
        views=1,
        view={"size": 64, "pixels": request.param},
        teacher={"image_size": 64, "grid": [2, 2]},
        codec={"name": "fp16"},
    )
    extract_targets(photos, out, settings, report=Silent())
    return out


def test_the_set_is_sound_and_its_teacher_agrees(fine_root, extract_settings):
    targets = TargetSet(fine_root)
    assert (targets.teacher.rows, targets.teacher.cols, targets.view_size) == (2, 2, 64)
    assert (targets[0].tokens.shape, targets[0].attention.shape) == ((5, 16), (4,))
    assert targets[0].attention.max() == 255
    assert not verify(fine_root, Silent()).own
    audit = verify_live(fine_root, 20, extract_settings().teacher.weights, device="cpu", report=Silent())
    assert audit.sound
    assert audit.raw > 0.9999


def test_repair_and_evaluation_use_the_same_grid(fine_root, extract_settings, tmp_path):
    weights = extract_settings().teacher.weights
    copy = shutil.copytree(fine_root, tmp_path / "copy")
    lost = next((copy / "latents" / "v00" / "000001.zarr").rglob("c/0/0/0"))
    lost.unlink()
    repair(verify(copy, Silent()), Silent(), weights=weights, device="cpu", workers=0)
    assert contents(copy) == contents(fine_root)
    targets = TargetSet(fine_root)
    encoder = load_encoder(f"teacher:{fine_root}@{weights}", 0, CPU)
    tokens = encoder.tokens(torch.from_numpy(targets[0].pixels).permute(2, 0, 1)[None]).together()[0]
    torch.testing.assert_close(
        torch.nn.functional.normalize(tokens, dim=-1), torch.from_numpy(targets[0].tokens), rtol=0, atol=2e-3
    )


def test_students_see_reduced_views_the_same_wherever_they_are_decoded(fine_root, pretrain_settings):
    targets = TargetSet(fine_root)
    by_place = {}
    for place, workers in (("workers", 0), ("workers", 2), ("device", 0)):
        settings = pretrain_settings(model=STUDENT, data={"decode": place}, epochs=2)
        plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=1)
        parts, axes = load_parts(plan, plan.steps, workers), plan.layout.sample_axes()
        by_place[place, workers] = list(on_device(parts, axes, CPU, view_size=plan.view_size))
    first = by_place["workers", 0]
    assert all(batch.pixels.shape[2:] == (32, 32) for batch in first)
    for batches in by_place.values():
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(batches, first, strict=True))
    reader = targets.reader("v00/000000")
    block = reader.block(0, ["norms"])
    wanted = view_pixels(block.jpegs[3], block.draws[3], targets.replayed, size=32, view_size=64)
    seen = {key: pixels for batch in first for key, pixels in zip(batch.keys, batch.pixels, strict=True)}
    np.testing.assert_array_equal(seen[block.keys[3]].permute(1, 2, 0), wanted)


def test_sets_and_batches_give_pixels_of_the_size_that_is_asked_for(fine_root):
    whole, small = TargetSet(fine_root), TargetSet(fine_root, image_size=32)
    assert (whole[5].pixels.shape, small[5].pixels.shape) == ((64, 64, 3), (32, 32, 3))
    by_key = {small[index].key: small[index].pixels for index in range(len(small))}
    for batches in (TargetBatches(small, batch_size=50), TargetBatches(whole, batch_size=50, image_size=32)):
        batch = next(iter(batches))
        for key, pixels in zip(batch.keys, batch.pixels, strict=True):
            np.testing.assert_array_equal(pixels.permute(1, 2, 0), by_key[key])
    assert next(iter(TargetBatches(small, batch_size=50, image_size=64))).pixels.shape[-1] == 64
    for refused in (lambda: TargetSet(fine_root, image_size=65), lambda: TargetBatches(whole, image_size=65)):
        with pytest.raises(SettingsError, match="image_size=65, and the set's views have 64 pixels"):
            refused()


def test_a_run_on_reduced_views_resumes_exactly_and_is_reported(fine_root, pretrain_settings, tmp_path):
    settings = pretrain_settings(model=STUDENT)
    for name, stops in (("whole", [None]), ("resumed", [3, None])):
        for stop in stops:
            pretrain(fine_root, tmp_path / name, settings.model_copy(update={"stop_after": stop}), report=Silent())
    whole, resumed = (contents(tmp_path / name)["encoder.safetensors"] for name in ("whole", "resumed"))
    assert whole == resumed
    report_runs([tmp_path / "whole"], [], [fine_root], out=tmp_path / "report", report=Silent(), device="cpu")
    page = next((tmp_path / "report").glob("*.html")).read_text()
    assert page.count("Latents of whole as colours") == 4
    assert "mismatch" not in page


@pytest.mark.parametrize("fine_root", ["stored"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "model", "what", "advice"),
    [
        # Sets of a 2 x 2 grid with views of 64 pixels, and of 4 x 4 with 32.
        ("fine", (64, 16), "grid", {"image_size": 32}),
        ("fine", (48, 16), "grid", {"image_size": 32}),
        ("fine", (128, 64), "image size", {"image_size": 64, "patch_size": 32}),
        ("own", (32, 16), "grid", {"patch_size": 8}),
        ("own", (36, 12), "grid", {"image_size": 32, "patch_size": 8}),
        ("own", (64, 8), "grid", {"image_size": 32}),
    ],
)
def test_a_student_that_does_not_fit_is_told_what_does(
    fine_root, target_root, pretrain_settings, kind, model, what, advice
):
    targets = TargetSet(fine_root if kind == "fine" else target_root)
    model = dict(zip(("image_size", "patch_size"), model, strict=True))
    with pytest.raises(SettingsError, match=f"{what} mismatch") as caught:
        check_fit(targets, pretrain_settings(model=model), 1)
    fix = caught.value.fix
    assert {name: int(value) for name, value in re.findall(r"--set model\.(\w+)=(\d+)", fix)} == advice
    check_fit(targets, pretrain_settings(model={**model, **advice}), 1)
    grid = model["image_size"] // model["patch_size"]
    assert ("make targets with --set view.size=128" in fix) == (what == "image size")
    assert (f"make targets with --set 'teacher.grid=[{grid},{grid}]'" in fix) == (grid < targets.teacher.rows)


@pytest.mark.parametrize("fine_root", ["stored"], indirect=True)
def test_an_online_teacher_cannot_see_more_than_the_student(fine_root, pretrain_settings):
    with pytest.raises(SettingsError, match="an online teacher sees the student's 32 pixels") as caught:
        check_fit(TargetSet(fine_root), pretrain_settings(model=STUDENT, targets="online"), 1)
    assert "--set targets=cached" in caught.value.fix
