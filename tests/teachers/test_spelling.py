"""One spelling of a teacher in every command and in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.api.targets import extract_settings
from cae2pipe.cli import app
from cae2pipe.errors import SettingsError, TeacherError
from cae2pipe.teachers.hub import spell
from cae2pipe.teachers.presets import latents_shape
from cae2pipe.teachers.spelling import teacher_settings

DINOV2 = "vit_small_patch14_dinov2.lvd142m"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (f"timm:{DINOV2}", {"kind": "timm", "name": DINOV2, "image_size": None}),
        (f"timm:{DINOV2}@w/x.pth", {"name": DINOV2, "weights": Path("w/x.pth")}),
        ("timm:vit_tiny_patch16_384@w.safetensors", {"name": "vit_tiny_patch16_384", "image_size": None}),
        ("open_clip:ViT-B-16/openai", {"kind": "open_clip", "name": "ViT-B-16", "pretrained": "openai"}),
        ("open_clip:ViT-L-14-336@w.pt", {"pretrained": None, "image_size": None, "weights": Path("w.pt")}),
        ("open_clip:ViT-B-16-SigLIP2-256/webli", {"kind": "open_clip", "image_size": None}),
        ("hf-hub:MahmoodLab/UNI2-h", {"kind": "timm", "name": "hf-hub:MahmoodLab/UNI2-h", "weights": None}),
        ("hf-hub:a/b@w.bin", {"name": "hf-hub:a/b", "weights": Path("w.bin")}),
        ("local-dir:runs/a@b", {"kind": "timm", "name": "local-dir:runs/a@b", "weights": None}),
        ("dinov3-b16", {"name": "vit_base_patch16_dinov3.lvd1689m", "image_size": 224}),
        ("clip-b16@w.pt", {"pretrained": "openai", "weights": Path("w.pt")}),
        ("clip-b16@file:///a/w.pt", {"weights": Path("/a/w.pt")}),
    ],
)
def test_a_spelling_gives_all_settings_of_its_model(text, values):
    settings = teacher_settings(text)
    assert {name: getattr(settings, name) for name in values} == values
    if ":" in text.partition("@")[0] and not text.startswith("local-dir"):
        assert spell(settings) == text.partition("@")[0]


@pytest.mark.parametrize(
    ("text", "error", "what", "fix"),
    [
        ("dinov3-b61", SettingsError, "nearest: 'dinov3-b16'", "cae2pipe teachers list"),
        (DINOV2, SettingsError, f"nearest: 'timm:{DINOV2}'", "timm:NAME.TAG"),
        ("ViT-B-16/openai", SettingsError, "nearest: 'open_clip:ViT-B-16/openai'", "open_clip:NAME/TAG"),
        ("foo:bar", SettingsError, "unknown teacher 'foo:bar'", "timm:NAME.TAG"),
        ("", SettingsError, "unknown teacher ''", "timm:NAME.TAG"),
        ("timm:", SettingsError, "must be followed by a name", "timm:NAME.TAG"),
        ("open_clip:@w.pt", SettingsError, "must be followed by a name", "timm:NAME.TAG"),
        ("hf-hub:UNI", SettingsError, "does not name a repository", "hf-hub:ORG/NAME"),
        ("timm:vit_smal_patch14_dinov2", TeacherError, "nearest: 'vit_small_patch14_dinov2'", "give timm:vit_small_"),
        ("timm:vit_small_patch14_dinov2.lvd", TeacherError, "no weights 'lvd'", f"give timm:{DINOV2}"),
        ("timm:vit_tiny_patch16_gap_reg4_dinov3", TeacherError, "timm has no model", "give timm:vit_"),
        ("open_clip:ViT-B-61/openai", TeacherError, "nearest: 'ViT-B-16'", "give open_clip:ViT-B-16/openai"),
        ("open_clip:ViT-B-16/datacomp_xl", TeacherError, "no weights 'datacomp_xl'", "ViT-B-16/datacomp_xl_s13b_b90k"),
        ("open_clip:vit-b-16/openai", TeacherError, "nearest: 'ViT-B-16'", "give open_clip:ViT-B-16/openai"),
        ("open_clip:ViT-S-61/openai", TeacherError, "nearest: 'ViT-S-16'", "give open_clip:ViT-S-16"),
        ("clip-b16@https://u:secret@h/x.pt", SettingsError, "not a URL", "copy what is there"),
        ("s3://u:secret@bucket/x.yaml", SettingsError, "not a URL", "copy what is there"),
        ("teacher:clip-b16", SettingsError, "is for encoders", "give clip-b16"),
        ("local-dir:@w.pt", SettingsError, "no @FILE", "local-dir:PATH"),
        ("open_clip:ViT-B-16", TeacherError, "no weights of ViT-B-16 are named", "ViT-B-16/openai"),
    ],
)
def test_a_wrong_spelling_is_refused_with_the_nearest_one(text, error, what, fix):
    with pytest.raises(error) as refused:
        teacher_settings(text)
    assert what in refused.value.what
    assert fix in refused.value.fix
    assert "ViT-S-16/openai" not in refused.value.fix  # a tag that the model lacks
    assert "secret" not in str(refused.value)


def test_a_file_of_settings_needs_a_section(tmp_path):
    (tmp_path / "a.yaml").write_text("views: 3\n")
    with pytest.raises(SettingsError, match="no section `teacher`"):
        teacher_settings(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text(f"teacher: {{kind: timm, name: {DINOV2}, image_size: 196}}\n")
    assert teacher_settings(f"{tmp_path / 'a.yaml'}@w.pt").image_size == 196


REST = dict.fromkeys(("views", "codec", "fidelity", "workers", "device"))


@pytest.mark.parametrize("config", ["clip-b16", cae2pipe.settings("extract", "clip-b16", {"views": 3})])
def test_nothing_of_the_presets_teacher_remains(config):
    """The default preset has `pretrained: openai`, which is not a tag of timm's DINOv2."""
    settings = extract_settings(config, ["teacher.image_size=224", "seed=5"], teacher=f"timm:{DINOV2}", **REST)
    assert settings.teacher == teacher_settings(f"timm:{DINOV2}").model_copy(update={"image_size": 224})
    assert (settings.teacher.pretrained, settings.seed) == (None, 5)
    assert settings.views == (16 if config == "clip-b16" else 3)


def test_a_tag_beside_the_presets_tag_is_explained():
    overrides = {"teacher.kind": "timm", "teacher.name": DINOV2}
    with pytest.raises(SettingsError, match=f"give --teacher timm:{DINOV2}, or --set teacher.pretrained=null"):
        extract_settings("clip-b16", overrides, teacher=None, **REST)


def test_extraction_takes_a_spelling_with_a_file(photos, tmp_path):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(5)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    words = (
        f"extract-targets {photos} {tmp_path / 'set'} --views 1 --workers 0 --device cpu --codec fp16 --set "
        f"teacher.image_size=32 --set view.size=32 --teacher timm:test_vit@{file}"
    )
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    made = cae2pipe.TargetSet(tmp_path / "set").artifact.identity
    assert (made["teacher"]["name"], made["settings"]["teacher"]["pretrained"]) == ("test_vit", None)
    result = CliRunner().invoke(app, [*words.split()[:-1], "timm:test_vitt"])
    assert result.exit_code == 2
    assert "nearest: 'test_vit" in result.output


def test_a_model_whose_own_size_is_no_whole_number_of_patches_takes_the_nearest_below():
    # 384 pixels with patches of 14, as published for several models of SigLIP.
    for name in ("timm:vit_so400m_patch14_siglip_384.webli", "open_clip:ViT-SO400M-14-SigLIP-384/webli"):
        assert latents_shape(teacher_settings(name))[:2] == (27, 27)
