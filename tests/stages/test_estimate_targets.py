"""The estimate compared with the set that is then made."""

from __future__ import annotations

import shutil

import pytest
import yaml
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.config.extract import recommend_views
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.targets.target_set import TargetSet


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_near_the_set_and_writes_nothing(target_root, photos, tmp_path, extract_settings, packed) -> None:
    source = tmp_path / "source"
    settings = extract_settings()
    if packed:
        build_shard_set(photos, source, settings.shard, report=Silent())
    else:
        shutil.copytree(photos, source)
    before = sorted(path for path in tmp_path.rglob("*"))
    result = estimate_targets(source, settings, Silent())
    assert "recommended" not in result
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (result["images"], result["views"]) == (150 if packed else result["images"], 2)
    rows = {row["codec"]: row for row in result["codecs"]}
    assert rows["klt"]["latents"] < rows["int8"]["latents"] < rows["fp16"]["latents"]
    assert rows["fp16"]["mean"] > rows["int8"]["mean"] > rows["klt"]["mean"] > 0.998
    stored = TargetSet(target_root).bytes_per_view()
    assert rows["klt"]["latents"] == pytest.approx(stored["latents"], rel=0.25)
    # For two views that share an image and its headers in the tar.
    assert result["pixels"] == pytest.approx(stored["pixels"] + 2048 / 2, rel=0.25)
    assert rows["klt"]["bytes"] == pytest.approx(
        result["images"] * 2 * (result["pixels"] + rows["klt"]["latents"]), rel=0.01
    )
    assert rows["klt"]["seconds"] > 0
    assert rows["klt"]["paid_from_epoch"] >= 2


def extract_command(source, out, settings, tmp_path, *more: str):
    """`cae2pipe extract-targets` on the tiny teacher."""
    config = tmp_path / "teacher.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return CliRunner().invoke(app, ["extract-targets", str(source), str(out), "--config", str(config), *more])


def test_views_are_recommended_for_so_many_epochs(photos, tmp_path, extract_settings, monkeypatch) -> None:
    cost = {}

    def kept(*arguments, **named):
        cost.update(estimate_targets(*arguments, **named))
        return cost

    monkeypatch.setattr("cae2pipe.api.targets.estimate", kept)
    result = extract_command(
        photos, tmp_path / "set", extract_settings(), tmp_path, "--estimate", "--epochs", "45", "--fidelity", "0.99"
    )
    assert result.exit_code == 0, result.output
    advice, klt = cost["recommended"], next(row for row in cost["codecs"] if row["codec"] == "klt")
    assert advice["epochs"] == 45
    assert advice["views"] == recommend_views(45) > cost["views"] == 2
    # The requested codec and fidelity, for another number of views, which share the same images.
    latents = klt["latents"] * (advice["views"] - cost["views"])
    assert advice["bytes"] == pytest.approx(klt["bytes"] + cost["images"] * latents, rel=0.001)
    assert advice["seconds"] == pytest.approx(klt["seconds"] * advice["views"] / 2)
    assert (advice["showings"], advice["showings_asked"]) == (45 / advice["views"], 22.5)
    said = " ".join(result.output.split())
    assert f"for 45 epochs, --views {advice['views']} is recommended" in said
    assert "with klt at 0.99," in said
    assert "with --views 2 it would be shown 22.5 times" in said
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("pixels", ["stored", "replayed"])
def test_it_says_by_how_much_larger_views_grow(photos, tmp_path, extract_settings, monkeypatch, pixels) -> None:
    costs = []

    def kept(*arguments, **named):
        costs.append(estimate_targets(*arguments, **named))
        return costs[-1]

    monkeypatch.setattr("cae2pipe.api.targets.estimate", kept)
    for view, teacher in ((32, {}), (64, {"image_size": 64, "grid": [2, 2]})):
        settings = extract_settings(view={"size": view, "pixels": pixels}, teacher=teacher)
        result = extract_command(photos, tmp_path / "set", settings, tmp_path, "--estimate")
        assert result.exit_code == 0, result.output
    plain, fine = costs
    assert "reduced" not in plain
    assert fine["reduced"]["size"] == 32
    assert fine["reduced"]["pixels"] == pytest.approx(plain["pixels"], rel=0.05)
    assert (fine["pixels"] > plain["pixels"]) == (pixels == "stored")  # these images are too small to be reduced
    times = fine["pixels"] / fine["reduced"]["pixels"]
    assert f"pixels take {times:.2f} times the" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "what"),
    [(("--epochs", "300"), "add --estimate"), (("--estimate", "--epochs", "0"), "invalid number of epochs: 0")],
)
def test_epochs_that_nothing_can_be_recommended_for_are_refused(
    photos, tmp_path, extract_settings, options, what
) -> None:
    result = extract_command(photos, tmp_path / "set", extract_settings(), tmp_path, *options)
    assert result.exit_code == 2
    assert what in result.output
    assert "--epochs" in result.output
    assert not (tmp_path / "set").exists()
