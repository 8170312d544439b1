"""Zero-shot classification: a run's head, a teacher's own output, class embeddings from files and from a text tower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.cli import app
from cae2pipe.config.base import build
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import ZeroshotSettings
from cae2pipe.config.pretrain import LossSettings, ModelSettings
from cae2pipe.errors import Cae2pipeError, DamageError, MismatchError, SettingsError, SourceError
from cae2pipe.evaluation.grid_plan import plan_grid
from cae2pipe.evaluation.zeroshot_classes import class_source, read_names
from cae2pipe.evaluation.zeroshot_encoders import load_aligned, refuse_unaligned
from cae2pipe.evaluation.zeroshot_text import embed_classes, load_text_tower, prompts_of
from cae2pipe.methods.registry import BUILT_IN, build_method
from cae2pipe.models.export import student_normalise
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.compare import compare
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.student import load_method, run_settings
from cae2pipe.training.target_spec import target_spec
from tests.conftest import DIM, PATCH, SIZE, snapshot, write_photos

CPU = torch.device("cpu")
CLASSES = [f"class{number}" for number in range(6)]
PROMPTS = ["a photo of a {}.", "art of the {}."]
CONFIG = {
    "embed_dim": DIM,
    "vision_cfg": {
        "image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
runner = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def clip_file(tmp_path_factory, teacher_file) -> Path:
    """Weights of a CLIP model, which open_clip knows as tiny-clip. Its visual tower is that of ``target_root``."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(CONFIG))
    (folder / "tiny-hf.json").write_text(json.dumps({**CONFIG, "text_cfg": {"hf_model_name": "roberta-base"}}))
    open_clip.add_model_config(folder)
    torch.manual_seed(5)
    state = CLIP(**CONFIG).state_dict()
    # Untrained embeddings of different texts are nearly equal.
    state["token_embedding.weight"] *= 50
    state |= load_file(teacher_file)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


@pytest.fixture(scope="module")
def clip(clip_file) -> CLIP:
    model = CLIP(**CONFIG)
    model.load_state_dict(load_file(clip_file))
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """30 val images in six classes; there are none to train on."""
    folder = tmp_path_factory.mktemp("data") / "data"
    write_photos(folder / "val", classes=6, each=5, seed=4)
    return folder


@pytest.fixture(scope="module")
def class_file(tmp_path_factory) -> Path:
    """Random embeddings of the classes and of one more, in another order than the data's."""
    path = tmp_path_factory.mktemp("classes") / "classes.safetensors"
    torch.manual_seed(9)
    names = ["other", *reversed(CLASSES)]
    save_file({"embeddings": torch.randn(7, DIM)}, path, {"names": json.dumps(names)})
    return path


def zeroshot(**over) -> ZeroshotSettings:
    return ZeroshotSettings(**{"speed": {"workers": 0, "device": "cpu"}, **over})


def scored(spec: Path | str, data: Path, out: Path, **over) -> dict:
    return evaluate_zeroshot(str(spec), data, out=out, settings=zeroshot(**over), report=Silent())


def aligned(spec: Path | str):
    return load_aligned(str(spec), CPU, precision="fp32", report=Silent())


@torch.no_grad()
def class_embeddings(clip: CLIP, names: list[str], prompts=PROMPTS) -> torch.Tensor:
    """Class embeddings by open_clip's own model."""
    tokenize = open_clip.get_tokenizer("tiny-clip")
    rows = [clip.encode_text(tokenize([prompt.format(name) for prompt in prompts]), normalize=True) for name in names]
    return torch.stack([F.normalize(row.mean(dim=0), dim=0) for row in rows])


@pytest.mark.parametrize("layout", ["plain", "custom"])
def test_class_embeddings_are_those_of_open_clip(layout, clip, clip_file, tmp_path):
    path = clip_file
    if layout == "custom":
        custom = CustomTextCLIP(**CONFIG)
        custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(clip.state_dict()))
        path = tmp_path / "custom.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in custom.state_dict().items()}, path)
    tower = load_text_tower(f"open_clip:tiny-clip@{path}")
    own = embed_classes(tower, [["dog"], ["red fox"]], PROMPTS, device=CPU, report=Silent())
    wanted = class_embeddings(clip, ["dog", "red fox"])
    assert wanted[0] @ wanted[1] < 0.99
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=0)
    synonyms = embed_classes(tower, [["dog", "red fox"]], PROMPTS[:1], device=CPU, report=Silent())
    both = class_embeddings(clip, ["dog", "red fox"], PROMPTS[:1]).mean(dim=0, keepdim=True)
    torch.testing.assert_close(synonyms, F.normalize(both, dim=1), atol=1e-6, rtol=0)


def test_the_configuration_next_to_a_file_gives_the_activation(clip_file, tmp_path):
    spec = f"open_clip:tiny-clip@{shutil.copy(clip_file, tmp_path / 'clip.safetensors')}"
    plain = class_source(zeroshot(text=spec, prompts=PROMPTS), CLASSES, CPU, Silent())
    (note,) = plain.notes
    assert "assumed, without QuickGELU" in note
    quick = {**CONFIG, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": quick, "preprocess_cfg": {}}))
    told = class_source(zeroshot(text=spec, prompts=PROMPTS), CLASSES, CPU, Silent())
    assert told.notes == ()
    assert told.identity != plain.identity
    model = CLIP(**quick)
    model.load_state_dict(load_file(clip_file))
    wanted = class_embeddings(model.eval(), CLASSES)
    torch.testing.assert_close(told.embed(), wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(plain.embed(), wanted, atol=1e-4)


def test_sets_of_prompts_are_those_of_open_clip():
    assert len(prompts_of("openai")) == 80
    assert prompts_of("openai")[0] == "a bad photo of a {}."
    assert len(prompts_of("simple")) == 7


@torch.no_grad()
def test_a_teachers_output_is_open_clips(clip, target_root, teacher_file):
    encoder = aligned(f"teacher:{target_root}@{teacher_file}")
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    wanted = clip.encode_image(encoder.teacher.normalise(pixels))
    torch.testing.assert_close(encoder(pixels).class_token, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_students_output_is_its_heads_of_the_class_token(trained_run):
    run = trained_run()
    method, _ = load_method(run, DIM, Silent())
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    wanted = method.head(method.bridge(method.encoder(student_normalise()(pixels))))[:, 0]
    torch.testing.assert_close(aligned(run)(pixels).class_token, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_method_predicts_without_masked_patches(name):
    settings = ModelSettings(
        width=32, depth=1, heads=2, image_size=SIZE, patch_size=PATCH, predictor_depth=1, predictor_width=16,
        predictor_heads=2,
    )  # fmt: skip
    method = build_method(name, settings, DIM).eval()
    visible = torch.arange(16).expand(2, -1)
    prediction = method(torch.randn(2, 3, SIZE, SIZE), visible, visible[:, :0])
    assert prediction.class_token.shape == (2, 1, DIM)
    assert prediction.class_token.isfinite().all()


@pytest.mark.parametrize("how", ["run", "teacher"])
def test_the_command_scores_with_a_text_tower(
    how, clip, clip_file, data, trained_run, target_root, teacher_file, tmp_path
):
    spec = str(trained_run()) if how == "run" else f"teacher:{target_root}@{teacher_file}"
    command = ["evaluate", "zeroshot", spec, str(data), str(tmp_path / "scores"), "--text"]
    command += [f"open_clip:tiny-clip@{clip_file}", "--workers", "0", "--device", "cpu", "--set", f"prompts={PROMPTS}"]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "standard error: top1 0.0" in done.output
    folder = tmp_path / "scores" / "zeroshot"
    result = json.loads((folder / "result.json").read_text())
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    # Again, from the stored features and by open_clip.
    (part,) = (tmp_path / "scores" / "features").glob("*.safetensors")
    features = load_file(part)
    best = (F.normalize(features["class"], dim=1) @ class_embeddings(clip, CLASSES).T).argsort(dim=1, descending=True)
    hits = best == features["labels"][:, None]
    top1 = hits[:, 0].float().mean().item()
    assert result["top1"] == pytest.approx(top1)
    assert result["top5"] == pytest.approx(hits[:, :5].any(dim=1).float().mean().item())
    assert result["top1_error"] == pytest.approx((top1 * (1 - top1) / 30) ** 0.5)
    assert result["images"] == {"train": 0, "val": 30}
    assert np.load(folder / "predictions.npz")["ranked"][:, 0].tolist() == best[:, 0].tolist()

    before = snapshot(folder)
    again = runner.invoke(app, command)
    assert "nothing to do" in again.output
    assert snapshot(folder) == before
    # The embeddings that were written serve as a file of their own.
    repeated = scored(spec, data, tmp_path / "again", classes=folder / "classes.safetensors")
    assert {name: repeated[name] for name in ("top1", "top5", "per_class")} == {
        name: result[name] for name in ("top1", "top5", "per_class")
    }
    listed = runner.invoke(app, ["results", str(tmp_path), "--format", "json"])
    assert {row["evaluation"] for row in json.loads(listed.output)} == {"zeroshot"}


def test_names_match_classes_and_sorted_order_does_without_names(class_file, data, trained_run, tmp_path):
    report = Silent()
    settings = zeroshot(classes=class_file)
    named = evaluate_zeroshot(str(trained_run()), data, out=tmp_path / "named", settings=settings, report=report)
    assert any("1 of the 7 class embeddings are of other classes" in line for line in report.lines)
    unnamed = tmp_path / "unnamed.safetensors"
    save_file({"embeddings": load_file(class_file)["embeddings"][1:].flip(0).contiguous()}, unnamed)
    score = cae2pipe.evaluate(
        "zeroshot", trained_run(), data, out=tmp_path / "unnamed", classes=unnamed, workers=0, progress=False
    )
    assert score.result["per_class"] == named["per_class"]
    assert score.top1_error > 0


def damaged(change: Callable[[dict, dict], None]) -> Callable[[Path, Path], Path]:
    """A changed copy of a file of class embeddings."""

    def make(path: Path, out: Path) -> Path:
        tensors, metadata = load_file(path), {"names": json.dumps(["other", *reversed(CLASSES)])}
        change(tensors, metadata)
        save_file(tensors, out, metadata)
        return out

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path, out: out, "no such file"),
        (lambda path, out: Path(shutil.copy(path, out.with_suffix(".pt"))), "not a file of class embeddings"),
        (lambda path, out: (out.write_bytes(path.read_bytes()[:-9]), out)[1], "not a complete safetensors file"),
        (damaged(lambda tensors, _: tensors.update(other=tensors.pop("embeddings"))), "not a file of class embeddings"),
        (damaged(lambda tensors, _: tensors["embeddings"][2].zero_()), "zero or not finite"),
        (damaged(lambda tensors, _: tensors["embeddings"][2].fill_(torch.nan)), "zero or not finite"),
        (damaged(lambda _, metadata: metadata.clear()), "7 class embeddings without names, the data 6 classes"),
        (damaged(lambda _, metadata: metadata.update(names="{}")), "not a JSON list"),
        (damaged(lambda _, metadata: metadata.update(names='["a"]')), "1 different names for 7 class embeddings"),
        (
            damaged(lambda _, metadata: metadata.update(names=json.dumps([*"abcdef", "class0"]))),
            "these classes of the data: 'class1', 'class2', 'class3' and 2 more",
        ),
    ],
)
def test_files_that_do_not_hold_the_classes_are_refused(make, said, class_file, tmp_path):
    path = make(class_file, tmp_path / "changed.safetensors")
    with pytest.raises(SourceError, match=said):
        class_source(zeroshot(classes=path), CLASSES, CPU, Silent())


def test_names_are_read_from_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("n01440764 tench, Tinca tinca\n\ngolden dog\tgolden retriever\nn3 unused\n")
    assert read_names(path, ["golden dog", "n01440764"]) == [["golden retriever"], ["tench", "Tinca tinca"]]
    for text, said in (
        ("n1 tench\n", "no names of these classes of the data: 'n2'"),
        ("n1\n", "'n1' has no name"),
        ("n1 a\nn1 b\n", "'n1' comes twice"),
        ("", "no names of these classes"),
    ):
        path.write_text(text)
        with pytest.raises(SourceError, match=said):
            read_names(path, ["n1", "n2"])
    with pytest.raises(SourceError, match="no such file of names"):
        read_names(tmp_path / "missing", ["n1"])


@pytest.mark.parametrize(
    ("over", "classes", "said"),
    [
        ({}, CLASSES, "no class embeddings are given"),
        ({"text": "timm:resnet18"}, CLASSES, "names no text tower of open_clip"),
        ({"text": "open_clip:tiny-clap/x"}, CLASSES, "nearest: 'tiny-clip'"),
        ({"text": "open_clip:tiny-clip@TOWER"}, CLASSES, "has no text tower"),
        ({"text": "open_clip:tiny-clip@MISSING"}, CLASSES, "no such weights file"),
        ({"text": "open_clip:tiny-clip"}, CLASSES, "neither"),
        ({"text": "open_clip:tiny-hf@TOWER"}, CLASSES, "is one of transformers"),
        ({"text": "open_clip:ViT-B-32/openai"}, CLASSES, "QuickGELU"),
        ({"text": "open_clip:tiny-clip@TOWER"}, ["n01440764", "n01443537"], "WordNet's numbers"),
    ],
)
def test_text_towers_that_cannot_be_used_are_named(over, classes, said, teacher_file, tmp_path):
    changed = {
        name: text.replace("TOWER", str(teacher_file)).replace("MISSING", str(tmp_path / "none"))
        for name, text in over.items()
    }
    with pytest.raises(Cae2pipeError, match=said):
        class_source(zeroshot(**changed), classes, CPU, Silent())


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"classes": "a", "text": "b"}, "given twice"),
        ({"classes": "a", "names": "b"}, "names are for a text tower"),
        ({"prompts": ["a photo"]}, "prompts must each contain {}"),
        ({"features": {"feature": "mean"}}, "uses the class token"),
    ],
)
def test_settings_that_contradict_each_other(over, said):
    with pytest.raises(SettingsError, match=said):
        build(ZeroshotSettings, over, "test")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"loss": {"visible": 0.0}}, r"its class token had no loss \(loss.visible is 0\)"),
        ({"method": "mae", "loss": {"target": "pixels", "kind": "mse"}}, "it was trained on pixels"),
        ("exported", "only a run has it"),
        ("random:tiny", "only a run has it"),
    ],
)
def test_encoders_without_a_trained_head_are_refused(spec, said, trained_run, exported):
    with pytest.raises(SettingsError, match=said):
        aligned(trained_run(**spec) if isinstance(spec, dict) else exported if spec == "exported" else spec)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"class_token": "none"}, "loss.class_token is none"),
        ({"class_token": "masked", "masked": 0}, "loss.masked is 0"),
    ],
)
def test_a_class_token_without_a_loss_is_refused_with_the_setting_that_says_so(loss, said):
    teacher = {"class_token": True, "dim": 8}
    with pytest.raises(SettingsError, match=rf"had no loss \({said}\)"):
        refuse_unaligned(LossSettings.model_validate(loss), teacher, "run")
    refuse_unaligned(LossSettings(class_token="masked", visible=0), teacher, "run")


def test_a_head_of_another_step_is_refused(make_run):
    run = make_run()
    # The checkpoint of an earlier step would have another head.
    last = max((run / "checkpoints").iterdir())
    state = torch.load(last, weights_only=True)
    state["model"]["encoder.norm.bias"] += 1
    torch.save(state, last)
    with pytest.raises(DamageError, match="not the one that the encoder was exported from"):
        aligned(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DamageError, match="no readable checkpoint"):
        aligned(run)


@pytest.mark.parametrize("first", ["knn", "zeroshot"])
@pytest.mark.parametrize("how", ["no class token", "class token and summary"])
def test_other_evaluations_in_the_same_folder_do_not_share_its_features(
    how, first, data, teacher_file, class_file, tmp_path
):
    vision = dict(CONFIG["vision_cfg"])
    over = {"project": False, "summary": True}
    if how == "no class token":
        vision["pool_type"], over = "avg", {}
    teacher = {"kind": "open_clip", "name": "tiny", "weights": str(teacher_file), "image_size": SIZE}
    teacher |= {"vision_cfg": vision, "embed_dim": DIM, "quick_gelu": False, **over}
    (tmp_path / "teacher.yaml").write_text(json.dumps({"teacher": teacher}))
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "val"):
        (folder / part).symlink_to(data / "val")

    def score(kind: str, out: str) -> dict:
        over = {"classes": class_file} if kind == "zeroshot" else {}
        spec = f"teacher:{tmp_path / 'teacher.yaml'}"
        return cae2pipe.evaluate(
            kind, spec, folder, out=tmp_path / out, workers=0, device="cpu", progress=False, **over
        ).result

    kinds = [first, "zeroshot" if first == "knn" else "knn"]
    together = [score(kind, "together") for kind in kinds]
    assert together == [score(kind, kind) for kind in kinds]


def test_other_widths_and_other_arguments_are_refused(trained_run, data, class_file, tmp_path):
    narrow = tmp_path / "narrow.safetensors"
    save_file({"embeddings": torch.ones(6, 8)}, narrow)
    with pytest.raises(SettingsError, match="have 8 dimensions, the encoder's output 16"):
        scored(trained_run(), data, tmp_path / "scores", classes=narrow)
    assert not (tmp_path / "scores").exists()
    with pytest.raises(SettingsError, match="text is only for zeroshot, not for knn"):
        cae2pipe.evaluate("knn", trained_run(), data, out=tmp_path / "scores", text="open_clip:a/b")


def test_a_grid_scores_zero_shot_and_refuses_variants_that_cannot(
    target_root, wide_root, summary_root, photos, class_file, tmp_path
):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "val"):
        (folder / part).symlink_to(photos)
    raw = {
        "title": "zero-shot",
        "config": "default",
        "set": {
            "epochs": 1,
            "model": {
                "width": 32, "depth": 1, "heads": 2, "image_size": SIZE, "patch_size": PATCH, "predictor_depth": 1,
                "predictor_width": 32, "predictor_heads": 2,
            },
            "mask": {"ratio": 0.4},
            "optimizer": {"warmup_epochs": 0},
            "data": {"batch": 32, "streams": 4, "window": 2},
        },
        "seeds": [0],
        "variants": [{"name": "caev2"}],
        "evaluate": [{"kind": "zeroshot", "set": {"classes": str(class_file)}}],
    }  # fmt: skip
    speed = {"workers": 0, "device": "cpu"}
    out = tmp_path / "out"
    result = compare(
        build(GridSettings, raw, "test"), "grid", target_root, data=folder, out=out, report=Silent(), speed=speed
    )
    assert result.columns == ["zeroshot"]
    assert len(result.rows[0].scores["zeroshot"]) == 1
    assert "class embeddings classes.safetensors" in result.protocols["zeroshot"]
    raw["variants"].append({"name": "masked alone", "set": {"loss": {"visible": 0.0}}})
    with pytest.raises(SettingsError, match="cannot classify zero-shot") as caught:
        plan_grid(build(GridSettings, raw, "test"), target_root, folder, out=out, speed=speed)
    assert caught.value.where == "variant 'masked alone'"
    raw["variants"] = [{"name": "no summary", "set": {"loss": {"summary": False}}}]
    raw["evaluate"][0]["set"]["teacher"] = "tiny"
    with pytest.raises(SettingsError, match="cannot classify zero-shot with this teacher") as caught:
        plan_grid(build(GridSettings, raw, "test"), [summary_root, wide_root], folder, out=out, speed=speed)
    assert caught.value.fix == "set teacher of the zeroshot evaluation to wide"
    raw["variants"] = [{"name": "MSE", "set": {"loss": {"kind": "mse"}}}]
    with pytest.raises(SettingsError, match="standardised latents of several teachers"):
        plan_grid(build(GridSettings, raw, "test"), [target_root, wide_root], folder, out=out, speed=speed)


def test_the_head_of_one_of_several_teachers(summary_root, wide_root, data, pretrain_settings, tmp_path):
    """By default of the one trained with texts, though it is the second."""
    run = tmp_path / "run"
    pretrain(
        [summary_root, wide_root], run, pretrain_settings(epochs=1, optimizer={"warmup_epochs": 0}), report=Silent()
    )
    classes = tmp_path / "classes.safetensors"
    save_file({"embeddings": torch.randn(6, 24, generator=torch.Generator().manual_seed(1))}, classes)
    result = scored(run, data, tmp_path / "scores", classes=classes)
    assert "head of wide, " in result["protocol"]
    assert scored(run, data, tmp_path / "scores", classes=classes, teacher="wide") == result
    with pytest.raises(MismatchError):
        scored(run, data, tmp_path / "scores", classes=classes, teacher="tiny")

    spec = target_spec(run_settings(run), TargetSet(summary_root), [TargetSet(wide_root)])
    model = build_method("caev2", run_settings(run).model, spec.dim, spec.summary).eval()
    checkpoint = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    model.load_state_dict(checkpoint["model"])
    pixels = torch.randint(256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    visible = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        whole = model(student_normalise()(pixels), visible, visible[:, :0])
    for label, wanted in (("wide", whole.class_token[:, 0, 16:]), ("tiny", whole.summary[:, 0])):
        encoder = load_aligned(str(run), CPU, precision="fp32", report=Silent(), teacher=label)
        torch.testing.assert_close(encoder.tokens(pixels).class_token, wanted)

    narrow = tmp_path / "narrow.safetensors"
    save_file({"embeddings": torch.ones(6, DIM)}, narrow)
    with pytest.raises(SettingsError, match="16 dimensions, the encoder's output 24"):
        scored(run, data, tmp_path / "other", classes=narrow)
    with pytest.raises(SettingsError, match="this run has no teacher 'dino'") as caught:
        scored(run, data, tmp_path / "other", classes=classes, teacher="dino")
    assert caught.value.fix == "give --teacher one of tiny, wide"


def test_standardised_latents_are_refused_before_another_teacher_is_proposed(
    summary_root, wide_root, pretrain_settings, tmp_path
):
    chosen = pretrain_settings(loss={"kind": "mse", "summary": False}, stop_after=1)
    pretrain([summary_root, wide_root], tmp_path, chosen, report=Silent())
    with pytest.raises(SettingsError, match="standardised latents of several teachers"):
        load_aligned(str(tmp_path), CPU, precision="fp32", report=Silent(), teacher="tiny")


def test_a_teacher_is_chosen_of_several_only(trained_run, data, class_file, tmp_path):
    with pytest.raises(SettingsError, match="not a run of several"):
        scored(trained_run(), data, tmp_path, classes=class_file, teacher="tiny")
    with pytest.raises(SettingsError, match="not a run of several"):
        scored("teacher:clip-b16", data, tmp_path, classes=class_file, teacher="tiny")
