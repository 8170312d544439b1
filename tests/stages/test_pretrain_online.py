"""The online teacher: the same targets, and fresh views."""

import pytest
import torch

from cae2pipe.errors import ManifestError, MismatchError, SettingsError, TeacherError
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import stage_world
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import make_helpers, pretrain
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.training.metrics import read_lines


@pytest.fixture(scope="module")
def fp16_root(photos, extract_settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("fp16") / "set"
    extract_targets(photos, root, extract_settings(codec={"name": "fp16"}), report=Silent())
    return root


def losses(root, targets, settings) -> list[float]:
    pretrain(targets, root, settings, report=Silent())
    return [line["loss"] for line in read_lines(root / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_online_on_stored_views_is_the_cached_run_to_the_codecs_error(
    target_root, fp16_root, teacher_file, pretrain_settings, tmp_path, kind
):
    loss = {"kind": kind}
    online = pretrain_settings(targets="online", teacher_weights=str(teacher_file), loss=loss)
    live = losses(tmp_path / "online", target_root, online)
    half = losses(tmp_path / "fp16", fp16_root, pretrain_settings(loss=loss))
    coded = losses(tmp_path / "klt", target_root, pretrain_settings(loss=loss))
    assert half == pytest.approx(live, rel=1e-3)
    assert coded == pytest.approx(live, rel=1e-2)
    assert max(abs(a - b) for a, b in zip(half, live, strict=True)) < max(
        abs(a - b) for a, b in zip(coded, live, strict=True)
    )


def test_the_online_teacher_computes_no_earlier_blocks(
    photos, extract_settings, teacher_file, pretrain_settings, tmp_path
):
    root = tmp_path / "set"
    extract_targets(photos, root, extract_settings(teacher={"layers": [1]}, views=1), report=Silent())
    targets = TargetSet(root)
    teacher = set_teacher(targets.artifact, teacher_file, torch.device("cpu"), option="")
    settings = pretrain_settings(targets="online", teacher_weights=str(teacher_file), precision="fp32")
    with stage_world("cpu", Silent()) as (world, report):
        online = make_helpers(targets, settings, stores=[], world=world, report=report).teachers[0]
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert list(teacher(pixels).layers) == [1]
    output = online(pixels)
    assert not output.layers
    assert torch.equal(output.tokens, teacher(pixels).tokens)


def test_fresh_views_differ_every_epoch_and_depend_on_the_seed(target_root, teacher_file, pretrain_settings):
    targets = TargetSet(target_root)

    def shown(**over) -> dict[tuple[int, str], bytes]:
        settings = pretrain_settings(targets="online", views="fresh", teacher_weights=str(teacher_file), **over)
        plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=4)
        assert plan.arrays == ()
        return {
            (batch.epoch, key): batch.pixels[row].numpy().tobytes()
            for batch in load_batches(plan, 0, 0)
            for row, key in enumerate(batch.keys)
            if key
        }

    first, again, other = shown(), shown(), shown(seed=1)
    assert first == again
    assert len(first) == 300
    assert all(first[0, key] != first[1, key] for epoch, key in first if epoch == 0)
    assert all(first[place] != other[place] for place in first)
    stored = TargetSet(target_root)
    assert not {view.pixels.transpose(2, 0, 1).tobytes() for view in stored} & set(first.values())


def test_a_run_on_fresh_views_trains_and_resumes(target_root, teacher_file, pretrain_settings, tmp_path):
    def settings(**over):
        over |= {"targets": "online", "views": "fresh", "teacher_weights": str(teacher_file), "optimizer": {"lr": 0.1}}
        return pretrain_settings(**over)

    whole = losses(tmp_path / "whole", target_root, settings())
    losses(tmp_path / "run", target_root, settings(stop_after=3))
    assert losses(tmp_path / "run", target_root, settings(speed={"workers": 2})) == whole
    assert whole[-1] < 0.8 * whole[0]


def test_a_teacher_that_cannot_be_had_is_named(target_root, pretrain_settings, tmp_path):
    with pytest.raises(TeacherError) as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(targets="online"), report=Silent())
    assert "teacher_weights=FILE" in caught.value.fix
    assert not (tmp_path / "run").exists(), "the run has been begun"


def test_other_weights_are_refused(target_root, teacher_file, pretrain_settings, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(teacher_file).items()}, other)
    with pytest.raises(MismatchError, match="not the weights"):
        pretrain(
            target_root,
            tmp_path / "run",
            pretrain_settings(targets="online", teacher_weights=str(other)),
            report=Silent(),
        )
    assert not (tmp_path / "run").exists(), "the run has been begun"


def test_originals_that_are_missing_or_others_are_refused(
    target_root, photos, extract_settings, teacher_file, pretrain_settings, tmp_path
):
    from cae2pipe.shards.build import build_shard_set

    def settings(originals):
        return pretrain_settings(
            targets="online", views="fresh", teacher_weights=str(teacher_file), originals=str(originals)
        )

    with pytest.raises(ManifestError, match="fresh views need"):
        pretrain(target_root, tmp_path / "run", settings(tmp_path / "nowhere"), report=Silent())
    shard = extract_settings(shard={"seed": 5}).shard
    build_shard_set(photos, tmp_path / "others", shard, report=Silent())
    with pytest.raises(MismatchError, match="not made from this shard set"):
        pretrain(target_root, tmp_path / "run2", settings(tmp_path / "others"), report=Silent())
    assert not any((tmp_path / name).exists() for name in ("run", "run2")), "the run has been begun"


def test_contradictions_are_refused(pretrain_settings):
    with pytest.raises(SettingsError, match="no cached targets"):
        pretrain_settings(views="fresh")
    with pytest.raises(
        SettingsError, match=r"data\.batch .32. is not divisible by mask\.repeat .3.: set mask\.repeat to 2"
    ):
        pretrain_settings(mask={"repeat": 3})
    with pytest.raises(SettingsError, match=r"loads 2 views, .* set data\.streams to 2"):
        pretrain_settings(mask={"repeat": 16})
    with pytest.raises(SettingsError, match="cropped by the workers"):
        pretrain_settings(targets="online", views="fresh", data={"decode": "device"})


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_two_online_teachers_are_the_cached_run_to_the_codecs_error(
    target_root, wide_root, teacher_file, pretrain_settings, tmp_path, kind
):
    roots, files = [target_root, wide_root], {"tiny": teacher_file, "wide": wide_root.parent / "wide.safetensors"}
    once = {"loss": {"kind": kind}, "stop_after": 2}
    given = {"targets": "online", "teacher_weights": {label: str(file) for label, file in files.items()}}
    runs = {"online": pretrain_settings(**once, **given), "cached": pretrain_settings(**once)}
    for name, settings in runs.items():
        pretrain(roots, tmp_path / name, settings, report=Silent())
    live, stored = (read_lines(tmp_path / name / "metrics.jsonl") for name in runs)
    assert len(live) == 2
    for one, other in zip(live, stored, strict=True):
        for label in files:
            assert one[f"loss/{label}"] == pytest.approx(other[f"loss/{label}"], rel=1e-2)
        assert one["loss"] != other["loss"]


def test_each_online_teacher_has_its_file(target_root, wide_root, teacher_file, pretrain_settings, tmp_path):
    def refused(given: dict, error, match: str) -> str:
        settings = pretrain_settings(targets="online", teacher_weights=given)
        with pytest.raises(error, match=match) as caught:
            pretrain([target_root, wide_root], tmp_path / "run", settings, report=Silent())
        assert not (tmp_path / "run").exists()
        return caught.value.fix

    missing = refused({"tiny": str(teacher_file)}, TeacherError, "weights")
    assert missing == "give the file: --set 'teacher_weights={wide: FILE}'"
    refused({"wide": str(teacher_file), "tiny": str(teacher_file)}, TeacherError, "visual.proj|shape|fit")
    assert refused({"dino": str(teacher_file)}, SettingsError, "gives a file to 'dino'") == "use tiny, wide"
