"""Settings: presets, overrides, refusals that help, identity."""

from __future__ import annotations

from contextlib import suppress

import pytest
import yaml

from cae2pipe.config.base import (
    Settings,
    fingerprinted,
    load,
    merge,
    parse_override,
    preset_names,
    read_preset,
    show,
)
from cae2pipe.config.dense import DENSE
from cae2pipe.config.evaluate import EVALUATIONS
from cae2pipe.config.extract import ExtractSettings, ShardSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import SettingsError

CLASSES = {"shard": ShardSettings, "extract": ExtractSettings, "pretrain": PretrainSettings}
SMALLEST = {
    "shard": (ShardSettings, None),
    "extract": (ExtractSettings, "clip-b16"),
    "pretrain": (PretrainSettings, "tiny"),
    **{f"evaluate {name}": (kind, name) for name, kind in {**EVALUATIONS, **DENSE}.items()},
}
PRESETS = [(stage, name) for stage in CLASSES for name in preset_names(stage)]


def pretrain(*overrides: str, preset: str = "base") -> PretrainSettings:
    return load(PretrainSettings, "pretrain", preset, overrides=overrides)


@pytest.mark.parametrize(("stage", "name"), PRESETS)
def test_every_preset_is_valid_and_shown_settings_load_again(stage, name, tmp_path):
    settings = load(CLASSES[stage], stage, name)
    text = show(settings)
    path = tmp_path / "shown.yaml"
    path.write_text(text)
    assert load(CLASSES[stage], stage, str(path)) == settings


@pytest.mark.parametrize("kind", CLASSES.values())
def test_every_field_is_documented(kind):
    def undocumented(model: type[Settings], prefix: str = "") -> list[str]:
        missing = []
        for name, info in model.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, Settings):
                missing += undocumented(annotation, f"{prefix}{name}.")
            elif not info.description:
                missing.append(prefix + name)
        return missing

    assert undocumented(kind) == []


@pytest.mark.parametrize(
    ("override", "message", "fix"),
    [
        ("model.widht=3", "unknown setting 'model.widht'", "did you mean 'model.width'"),
        ("modle.width=3", "unknown setting 'modle'", "did you mean 'model'"),
        ("mask.ratio=1", "mask.ratio: Input should be less than 1", "--set mask.ratio"),
        ("epochs=many", "epochs: Input should be a valid integer", "--set epochs"),
        ("data.streams=60", "set data.streams to 32", None),
        ("mask.ratio=0.9999", "masks 196 of 196 patches", None),
        ("model.patch_size=15", "not a multiple of model.patch_size", None),
        ("model.heads=7", "not a multiple of model.heads", None),
        ("model={rotary_positions: true, relative_positions: true}", "set one of them to false", None),
        ("model={rotary_positions: true, predictor_heads: 11}", "model.predictor_heads: rotary positions need", None),
        ("optimizer.warmup_epochs=300", "must be less than epochs", None),
        ("optimizer.lr=.nan", "optimizer.lr", "--set"),
        ("loss={visible: 0, masked: 0}", "set one of them above 0", None),
        ("data.batch=", "data.batch", "--set data.batch"),
        ("seed", "invalid override", "--set seed=1"),
        ("a..b=1", "invalid override", "--set"),
        ("seed=[1", "not valid YAML", "quote"),
        ("seed={a: 1, a: 2}", "duplicate key 'a'", "quote"),
        ("seed=" + "[" * 500, "nested too deeply", "quote"),
        (f"{'a.' * 20}b=1", "invalid override", "--set"),
        ("epochs=1:30", "epochs: Input should be a valid integer", "--set epochs"),
        ("epochs=yes", "epochs: Input should be a valid integer", "--set epochs"),
        ("epochs=true", "epochs must be a number, not true or false", None),
        ("model.depth=true", "depth must be a number, not true or false", None),
        (f"seed={2**63}", "seed has more than 64 bits", None),
        (f"optimizer.lr={10**400}", "lr has more than 64 bits", None),
        ("model.depth=100000", "model.depth: Input should be less than or equal to 256", "--set model.depth"),
        ("model={width: 16384, depth: 256, heads: 16}", "billion weights: lower model.width", None),
        ("model={image_size: 4096, patch_size: 1}", "set model.patch_size so that it is at most 256", None),
        ("speed.cache_gb=1e300", "speed.cache_gb", "--set"),
        ("seed='" + "x" * 10000 + "'", "xxx...", "--set seed"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(override, message, fix):
    with pytest.raises(SettingsError) as caught:
        pretrain(override)
    assert message in str(caught.value)
    if fix:
        assert fix in str(caught.value.fix)
    assert caught.value.exit_code == 2


def fields(model: type[Settings], prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    found = []
    for name, info in model.model_fields.items():
        inner = isinstance(info.annotation, type) and issubclass(info.annotation, Settings)
        found += fields(info.annotation, f"{prefix}{name}.") if inner else [prefix + name]
    return found


@pytest.mark.parametrize("stage", SMALLEST)
def test_every_number_has_bounds(stage):
    """Whole numbers of more than 40 bits are refused for all settings but seeds and stop_after."""
    kind, preset = SMALLEST[stage]
    taken = []
    for name in fields(kind):
        with suppress(SettingsError):
            value = load(kind, stage.split()[0], preset, overrides=[f"{name}={2**50}"])
            for part in name.split("."):
                value = getattr(value, part)
            # Text, and rates that are divided by, may be anything.
            taken += [name] if isinstance(value, int | tuple) else []
    # Neighbours are counted by the images that there are.
    assert set(taken) <= {"seed", "shard.seed", "ignore", "k"}


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("extract", "view.size=100000"),
        ("extract", "view.scale=[1e-9, 1]"),
        ("extract", "teacher.std=[0, 1, 1]"),
        ("evaluate knn", "features.crop=1e-9"),
        ("evaluate knn", "features.image_size=100000"),
        ("evaluate linear", "draw.ratio=[1e-9, 1]"),
        ("evaluate finetune", "crop=0.01"),
        ("evaluate segment", "scale=[100000, 512]"),
        ("evaluate detect", "short_sides=[100000]"),
    ],
)
def test_sizes_that_no_machine_could_bear(stage, override):
    kind, preset = SMALLEST[stage]
    with pytest.raises(SettingsError) as caught:
        load(kind, stage.split()[0], preset, overrides=[override])
    assert override.split("=")[0].split(".")[-1] in str(caught.value)


def test_recipes_that_are_no_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, name in (("recipes: 3\n", "recipes"), ("recipes: {paper: 3}\nrecipe: paper\n", "recipes.paper")):
        path.write_text(text)
        with pytest.raises(SettingsError, match=f"{name} is not a mapping"):
            load(PretrainSettings, "pretrain", str(path))


def test_unknown_presets_and_files():
    with pytest.raises(SettingsError, match="nearest: 'base'"):
        pretrain(preset="bse")
    with pytest.raises(SettingsError, match="no such settings file"):
        pretrain(preset="./none.yaml")


def test_files_extend_presets_and_overrides_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nmask: {ratio: 0.4}\nepochs: 20\n")
    settings = pretrain("epochs=30", preset=str(path))
    assert (settings.model.width, settings.mask.ratio, settings.epochs) == (192, 0.4, 30)
    path.write_text("- a list\n")
    with pytest.raises(SettingsError, match="must be a mapping"):
        pretrain(preset=str(path))
    path.write_text("a: [1\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        pretrain(preset=str(path))


@pytest.mark.parametrize(
    ("size", "paper", "official"),
    [
        ("tiny", (12, 12, 29), (12, 12, 30)),
        ("small", (6, 12, 49), (12, 12, 49)),
        ("base", (12, 12, 98), (12, 12, 98)),
        ("large", (16, 16, 118), (16, 12, 118)),
    ],
)
def test_recipes_differ_where_the_paper_and_the_code_do(size, paper, official):
    for recipe, expected in (("paper", paper), ("official", official)):
        settings = pretrain(f"recipe={recipe}", preset=size)
        assert (settings.model.heads, settings.model.predictor_heads, settings.masked_patches) == expected
        is_paper = recipe == "paper"
        assert settings.model.head == ("fc-ln" if is_paper else "ln-fc")
        assert settings.loss.reduction == ("two_means" if is_paper else "one_mean")
        assert settings.optimizer.beta2 == (0.98 if is_paper else 0.999)
        assert settings.data.last_batch == ("pad" if is_paper else "drop")
    assert pretrain("recipe=official", "optimizer.beta2=0.95", preset=size).optimizer.beta2 == 0.95


def test_layer_scale_starts_lower_in_large():
    """As in the released code; the paper is silent."""
    initial = {size: pretrain(preset=size).model.layer_scale for size in ("tiny", "small", "base", "large")}
    assert initial == {"tiny": 0.1, "small": 0.1, "base": 0.1, "large": 1e-5}


def test_huge_is_the_designs():
    settings = pretrain(preset="huge")
    m = settings.model
    assert (m.width, m.depth, m.heads, m.patch_size, m.drop_path) == (1280, 32, 16, 14, 0.3)
    assert (m.predictor_depth, m.predictor_width, m.grid, settings.masked_patches) == (4, 1280, 16, 154)


def test_identity_leaves_out_speed_places_and_amounts():
    base = load(ExtractSettings, "extract", "clip-b16")
    same = load(
        ExtractSettings,
        "extract",
        "clip-b16",
        overrides=["speed.workers=3", "views=9", "teacher.weights=x.safetensors"],
    )
    other = load(ExtractSettings, "extract", "clip-b16", overrides=["codec.fidelity=0.99"])
    assert fingerprinted(base) == fingerprinted(same)
    assert fingerprinted(base) != fingerprinted(other)
    assert "speed" not in fingerprinted(base)


def test_overrides_are_yaml():
    assert parse_override("a.b=1e-3") == {"a": {"b": 1e-3}}
    assert pretrain("optimizer.lr=1e-3").optimizer.lr == 1e-3
    assert parse_override("a={b: [1, 2]}") == {"a": {"b": [1, 2]}}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_shown_settings_carry_documentation():
    text = show(pretrain())
    assert "# Peak learning rate at a batch of 2048" in text
    assert yaml.safe_load(text)["optimizer"]["lr"] == 1.5e-3
    assert isinstance(read_preset("pretrain", "base"), dict)


def test_settings_that_extend_themselves_and_folders_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml")
    with pytest.raises(SettingsError, match="in a circle"):
        read_preset("pretrain", str(tmp_path / "a.yaml"))
    (tmp_path / "c.yaml").mkdir()
    with pytest.raises(SettingsError, match="this is a folder"):
        read_preset("pretrain", str(tmp_path / "c.yaml"))
