"""One small model of each family, from a file in its authors' layout: the latents are the library's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip.factory
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from safetensors.torch import save_file
from torch import Tensor, nn

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher, TeacherOutput

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
NARROW: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 2}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1]}
Layout = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def perturbed(model: Any) -> Any:
    """A model whose every parameter differs from its initial value: gates, norms and biases as well."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
    return path


def images(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.5) / 0.5


def loaded(name: str, file: Path, size: int | None = None, **over: Any) -> Teacher:
    return load_teacher(
        TeacherSettings(kind="timm", name=name, weights=file, image_size=size, mean=HALF, std=HALF, **over), CPU
    )


def own(name: str, state: dict[str, Tensor], size: int | None, args: dict[str, Any]) -> Any:
    """The model as timm itself loads it."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    if size:
        options["img_size"] = size
    copied = {key: tensor.clone() for key, tensor in state.items()}
    overlay = {"state_dict": copied, "source": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **options).eval()


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def open_clips(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole CLIP, whose visual tower is a trunk of timm."""
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    return trunk | {"text.positional_embedding": torch.zeros(2, 2), "logit_scale": torch.ones([])}


def metas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3 as Meta distributes it."""
    renamed = {
        name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens"): one
        for name, one in state.items()
    }
    biases = {f"blocks.{index}.attn.qkv.bias": torch.zeros(192) for index in range(2)}
    masks = {f"blocks.{index}.attn.qkv.bias_mask": torch.zeros(192) for index in range(2)}
    return renamed | biases | masks | {"rope_embed.periods": torch.ones(8), "mask_token": torch.zeros(1, 64)}


def nvidias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """C-RADIO as NVIDIA distributes it: positions on a grid of 128 x 128, patches through a linear layer."""
    start = "radio_model.model."
    generator = torch.Generator().manual_seed(2)
    return {
        f"{start}patch_generator.embedder.weight": state["patch_embed.proj.weight"].flatten(1),
        f"{start}patch_generator.pos_embed": torch.randn(1, 128 * 128, 64, generator=generator),
        f"{start}patch_generator.cls_token.token": torch.cat([state["cls_token"][0], state["reg_token"][0]]),
        **{start + name: tensor for name, tensor in state.items() if name.startswith("blocks.")},
        "radio_model.input_conditioner.norm_mean": torch.zeros(3),
        "radio_model.summary_idxs": torch.zeros(2),
    }


def openais(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP as OpenAI distributes it."""
    names = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj.weight": "conv1.weight",
        "norm_pre.": "ln_pre.",
        "norm.": "ln_post.",
        "blocks.": "transformer.resblocks.",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
    }
    result = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        for ours, theirs in names.items():
            if name.startswith(ours) or (ours in name and name.startswith("blocks.")):
                name = name.replace(ours, theirs, 1)
        result[f"visual.{name}"] = tensor
    result["visual.class_embedding"] = state["cls_token"][0, 0]
    result["visual.positional_embedding"] = state["pos_embed"][0]
    return result | {"visual.proj": state["head.weight"].T, "logit_scale": torch.ones([])}


VITS: list[tuple[str, Layout, int, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", plain, 96, NARROW),
    ("deit_tiny_distilled_patch16_224", plain, 96, NARROW),
    ("deit3_small_patch16_224", plain, 96, NARROW),
    ("vit_small_patch14_reg4_dinov2", plain, 98, NARROW),
    ("vit_small_patch16_dinov3", metas, 96, NARROW),
    ("vit_small_patch16_dinov3", plain, 96, NARROW),
    ("beit_base_patch16_224", plain, 96, NARROW),
    ("beitv2_base_patch16_224", plain, 96, NARROW),
    ("beit3_base_patch16_224", plain, 96, NARROW),
    ("eva02_tiny_patch14_224", plain, 98, NARROW),
    ("eva02_base_patch16_clip_224", open_clips, 96, NARROW),
    ("vit_pe_core_tiny_patch16_384", open_clips, 96, NARROW),
    ("vit_pe_spatial_tiny_patch16_512", plain, 96, NARROW),
    ("vit_base_patch16_siglip_224", open_clips, 96, NARROW),
    ("vit_base_patch16_siglip_gap_224", plain, 96, NARROW),
    ("vit_base_patch16_radio_v3", nvidias, 96, NARROW),
    ("vit_base_patch16_radio_v3", plain, 96, NARROW),
    ("flexivit_small", plain, 96, NARROW),
    ("vit_relpos_base_patch16_clsgap_224", plain, 96, NARROW),
]


@pytest.mark.parametrize(("name", "layout", "other", "args"), VITS, ids=[f"{row[0]}-{row[1].__name__}" for row in VITS])
def test_a_vits_tokens_are_timms_own(name, layout, other, args, tmp_path):
    whole = perturbed(timm.create_model(name, **args))
    state = layout(dict(whole.state_dict()))
    file = saved(state, tmp_path / "model.safetensors")
    native = timm.get_pretrained_cfg(name).input_size[-1]
    # timm's own mapping of the tower's weights for another size, and its forward, are what is asked for.
    for size in (other, native if native < 300 else other * 2):
        teacher = loaded(name, file, size, model_args=args, project=False)
        model = own(name, state, size, args)
        with torch.inference_mode():
            features = model.forward_features(normalised(images(size)))
            final = model.fc_norm(features) if isinstance(model.norm, nn.Identity) else features
            pooled = model.forward_head(features, pre_logits=True)
        output = teacher(images(size))
        info = teacher.info
        assert (info.rows, info.cols) == (size // model.patch_embed.patch_size[0],) * 2
        patches = final[:, model.num_prefix_tokens :]
        torch.testing.assert_close(output.tokens[:, int(info.class_token) :], patches, rtol=1e-5, atol=1e-5)
        if info.class_token:
            torch.testing.assert_close(output.tokens[:, 0], final[:, 0], rtol=1e-5, atol=1e-5)
            assert info.summary is None
            assert output.summary is None
        else:
            assert info.summary == pooled.shape[1]
            torch.testing.assert_close(output.summary, pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("vit_tiny_patch16_224", True),
        ("vit_small_patch16_dinov3", True),
        ("vit_small_patch14_reg4_dinov2", True),
        ("eva02_base_patch16_clip_224", True),
        ("vit_base_patch16_radio_v3", True),
        ("beit_base_patch16_224", False),
        ("beit3_base_patch16_224", False),
        ("eva02_tiny_patch14_224", False),
        ("vit_pe_core_tiny_patch16_384", False),
        ("vit_base_patch16_siglip_224", False),
    ],
)
def test_a_class_token_is_stored_only_where_the_model_reads_it(name, trained, tmp_path):
    model = perturbed(timm.create_model(name, num_classes=8, img_size=96 if "14" not in name else 98, **NARROW))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    size = 98 if "14" in name else 96
    info = loaded(name, file, size, model_args=NARROW, project=False).info
    assert info.class_token == trained
    assert (info.summary is None) == trained
    raw = loaded(name, file, size, model_args=NARROW, output="raw")
    assert raw.info.class_token == (model.cls_token is not None)
    assert raw.info.summary is None
    never = loaded(name, file, size, model_args=NARROW, project=False, summary=False)
    assert never(images(size)).summary is None
    always = loaded(name, file, size, model_args=NARROW, project=False, summary=True)(images(size))
    if trained:  # these are what the model's own output is
        assert torch.equal(always.summary, always.tokens[:, 0])


MAPS: list[tuple[str, int | None, dict[str, Any]]] = [
    ("swin_tiny_patch4_window7_224", 112, {**STAGES, "embed_dim": 16, "num_heads": [1, 2, 2, 2]}),
    ("swinv2_tiny_window8_256", 128, {**STAGES, "embed_dim": 16, "num_heads": [1, 2, 2, 2]}),
    ("convnext_atto", 96, {**STAGES, "dims": [8, 16, 24, 32]}),
    ("hiera_tiny_224", None, {"stages": [1, 1, 1, 1], "embed_dim": 16}),
    ("efficientvit_m0", None, {}),
    ("test_efficientnet", 96, {}),
    ("test_vit", 96, {}),
]


@pytest.mark.parametrize(("name", "other", "args"), MAPS, ids=[row[0] for row in MAPS])
def test_the_last_map_is_normed_and_the_summary_is_the_models_output(name, other, args, tmp_path):
    whole = perturbed(timm.create_model(name, num_classes=8, **args_of(args)))
    state = dict(whole.state_dict())
    file = saved(state, tmp_path / "model.safetensors")
    native = timm.get_pretrained_cfg(name).input_size[-1]
    stage = len(whole.feature_info) - 1
    size = other or native
    teacher = loaded(name, file, size, stage=stage, model_args=args)
    takes_size = size != native and name not in ("convnext_atto", "test_efficientnet")
    model = own(name, state, size if takes_size else None, args)
    output = teacher(images(size))
    with torch.inference_mode():
        features = model.forward_features(normalised(images(size)))
        torch.testing.assert_close(output.summary, model.forward_head(features, pre_logits=True), rtol=1e-5, atol=1e-5)
    if name.startswith(("swin", "test_vit")):  # their own norm is part of forward_features
        channels_last = features.flatten(1, -2)[:, getattr(model, "num_prefix_tokens", 0) :]
        torch.testing.assert_close(output.tokens, channels_last, rtol=1e-5, atol=1e-5)
    if name in ("convnext_atto", "hiera_tiny_224"):  # their norm comes after pooling
        norm = model.head.norm.requires_grad_(False)
        raw = loaded(name, file, size, stage=stage, model_args=args, output="raw")(images(size)).tokens
        normed = F.layer_norm(raw, raw.shape[-1:], norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(output.tokens, normed, rtol=1e-5, atol=1e-5)
    if stage:
        between = loaded(name, file, size, stage=stage - 1, model_args=args)
        assert between.info.summary is None
        assert between.info.architecture.get("norm") is None


@pytest.mark.parametrize("name", ["test_nfnet", "efficientvim_m1"])
def test_the_last_map_is_what_the_head_reads(name, tmp_path):
    """timm's own intermediates omit NFNet's final activation, and give EfficientViM's map another layer's norm."""
    model = perturbed(timm.create_model(name))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    with torch.inference_mode():
        final = model.forward_features(normalised(images(64)))
    final = final[-1] if isinstance(final, list) else final
    teacher = loaded(name, file, 64, stage=len(model.feature_info) - 1)
    expected = final.flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher(images(64)).tokens, expected, rtol=1e-5, atol=1e-5)


def args_of(args: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}


def test_dinov3s_convnext_gives_what_dinov3_does(tmp_path):
    """Its authors norm the pooled token and all positions together."""
    args = {**STAGES, "dims": [8, 16, 24, 32]}
    name = "convnext_tiny.dinov3_lvd1689m"
    model = perturbed(timm.create_model(name, num_classes=0, **args_of(args)))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    output = loaded(name, file, 96, stage=3, model_args=args)(images(96))
    with torch.inference_mode():
        x = model.forward_features(normalised(images(96)))
        tokens = torch.cat([x.mean((2, 3)).unsqueeze(1), x.flatten(2).transpose(1, 2)], dim=1)
        norm = model.head.norm
        tokens = F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(output.summary, tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.tokens, tokens[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("hiera_tiny_224", 256), ("cait_xxs24_224", 256)])
def test_a_network_of_one_size_names_it(name, size, tmp_path):
    args = {"stages": [1, 1, 1, 1], "embed_dim": 16} if name.startswith("hiera") else {"depth": 1}
    file = saved(perturbed(timm.create_model(name, **args_of(args))).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(TeacherError, match="takes 224 pixels only") as refused:
        loaded(name, file, size, stage=0 if name.startswith("hiera") else None, model_args=args)
    assert refused.value.fix == "--set teacher.image_size=224"


def test_clips_projection_is_applied_on_timms_road(tmp_path):
    name = "vit_medium_patch16_clip_224.tinyclip_yfcc15m"
    model = perturbed(timm.create_model(name, img_size=96, **NARROW))
    with torch.no_grad():
        model.head.bias.zero_()
        model.patch_embed.proj.bias.zero_() if model.patch_embed.proj.bias is not None else None
    for layout in (plain, openais):
        file = saved(layout(dict(model.state_dict())), tmp_path / f"{layout.__name__}.safetensors")
        teacher = loaded(name, file, 96, model_args=NARROW)
        with torch.inference_mode():
            embedding = model(normalised(images(96)))
            tokens = model.head(model.forward_features(normalised(images(96))))
        output = teacher(images(96))
        assert (teacher.info.dim, teacher.info.summary) == (512, None)
        torch.testing.assert_close(output.tokens[:, 0], embedding, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.tokens, tokens, rtol=1e-5, atol=1e-5)
        assert loaded(name, file, 96, model_args=NARROW, project=False).info.dim == 64
        assert loaded(name, file, 96, model_args=NARROW, output="raw").info.dim == 64
    with pytest.raises(TeacherError, match="no projection of CLIP"):
        loaded("vit_tiny_patch16_224", file, 96, model_args=NARROW, project=True)


def test_an_attention_pooled_clips_summary_is_projected(tmp_path):
    name = "vit_pe_core_tiny_patch16_384.fb"
    model = perturbed(timm.create_model(name, img_size=96, **NARROW))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    teacher = loaded(name, file, 96, model_args=NARROW)
    assert (teacher.info.dim, teacher.info.summary) == (64, 512)
    with torch.inference_mode():
        embedding = model(normalised(images(96)))
    torch.testing.assert_close(teacher(images(96)).summary, embedding, rtol=1e-5, atol=1e-5)


TOWERS: list[tuple[str, dict[str, Any], int]] = [
    ("SigLIP's", {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}, 96),
    ("EVA's", {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}, 96),
    ("ConvNeXt's", {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160}, 96),
    ("MobileCLIP's", {"timm_model_name": "test_byobnet", "timm_pool": "avg", "timm_proj": None, "image_size": 160}, 96),
    ("ViTamin's", {"timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear", "image_size": 160}, 96),
    ("CLIPA's", {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 32, "no_ln_pre": True,
                 "pool_type": "avg", "final_ln_after_pool": True}, 0),
    ("CoCa's", {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 32,
                "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}, 0),
    ("OpenAI's", {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 32}, 0),
    ("a ResNet's", {"width": 8, "layers": [1, 1, 1, 1], "image_size": 64}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "other"), TOWERS, ids=[row[0] for row in TOWERS])
def test_a_tower_of_open_clip_gives_its_embedding(name, config, other, tmp_path, monkeypatch):
    width = 512 if config.get("timm_model_name") else 16
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {"embed_dim": width, "vision_cfg": config})
    tower = perturbed(_build_vision_tower(width, dict(config)))
    file = saved({f"visual.{key}": one for key, one in tower.state_dict().items()}, tmp_path / "clip.safetensors")
    for size in filter(None, (config["image_size"], other)):
        settings = TeacherSettings(kind="open_clip", name=name, weights=file, image_size=size, mean=HALF, std=HALF)
        teacher = load_teacher(settings, CPU)
        if size != config["image_size"]:
            tower.set_input_size(size)
        with torch.inference_mode():
            embedding = tower(normalised(images(size)))
        embedding = embedding[0] if isinstance(embedding, tuple) else embedding
        output = teacher(images(size))
        given = output.tokens[:, 0] if teacher.info.class_token else output.summary
        torch.testing.assert_close(given, embedding, rtol=1e-5, atol=1e-5)
        assert output.tokens.shape[1:] == (
            teacher.info.rows * teacher.info.cols + teacher.info.class_token,
            teacher.info.dim,
        )
        if trunk := getattr(tower, "trunk", None):
            with torch.inference_mode():
                final = trunk.forward_features(normalised(images(size)))
                check_trunk(trunk, final, output, teacher.info.class_token)


def check_trunk(trunk: Any, final: Tensor, output: TeacherOutput, class_token: bool) -> None:
    """The tokens are the trunk's after its final norm, with the projection where it is of the class token."""
    if final.ndim == 4:
        expected = final.flatten(2).transpose(1, 2)
        norm = getattr(trunk.head, "norm", None)
        if isinstance(norm, nn.LayerNorm):
            expected = F.layer_norm(expected, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    else:
        expected = (trunk.fc_norm(final) if isinstance(trunk.norm, nn.Identity) else final)[
            :, 0 if class_token else trunk.num_prefix_tokens :
        ]
        expected = trunk.head(expected) if class_token else expected
    torch.testing.assert_close(output.tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
)
def test_taps_are_the_blocks_tokens_after_the_final_norm(name, tmp_path):
    model = perturbed(timm.create_model(name, num_classes=0, img_size=96, **{**NARROW, "depth": 3}))
    file = saved(model.state_dict(), tmp_path / "model.safetensors")
    teacher = loaded(name, file, 96, model_args={**NARROW, "depth": 3}, layers=(1, 3))
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.inference_mode():
        model.forward_features(normalised(images(96)))
        norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
        wanted = {number: norm(seen[number - 1]) for number in (1, 3)}
    output = teacher(images(96))
    assert teacher.info.identity()["layers"] == [1, 3]
    assert list(output.layers) == [1, 3]
    for number, tokens in wanted.items():
        patches = tokens[:, model.num_prefix_tokens :]
        expected = torch.cat([tokens[:, :1], patches], dim=1) if teacher.info.class_token else patches
        torch.testing.assert_close(output.layers[number], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.layers[3], output.tokens, rtol=1e-5, atol=1e-5)
    with pytest.raises(TeacherError, match="no block 4, only 1 to 3"):
        loaded(name, file, 96, model_args={**NARROW, "depth": 3}, layers=(4,))


def test_what_does_not_fit_says_what_does(tmp_path):
    model = perturbed(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **NARROW))
    foreign = saved({"embeddings.cls_token": torch.zeros(1), "layer.0.norm1.weight": torch.zeros(1)}, tmp_path / "t.st")
    foreign = foreign.rename(tmp_path / "t.safetensors")
    with pytest.raises(TeacherError, match="layout of the transformers library"):
        loaded("vit_small_patch16_dinov3", foreign, 96, model_args=NARROW)
    biased = metas(dict(model.state_dict()))
    biased["blocks.0.attn.qkv.bias"] += 1
    with pytest.raises(TeacherError, match="biases that vit_small_patch16_dinov3 lacks") as refused:
        loaded("vit_small_patch16_dinov3", saved(biased, tmp_path / "b.safetensors"), 96, model_args=NARROW)
    assert refused.value.fix.endswith("vit_small_patch16_dinov3_qkvb")
    naflex = saved({"a": torch.zeros(1)}, tmp_path / "n.safetensors")
    with pytest.raises(TeacherError, match="gives its patches only as a feature map") as refused:
        loaded("naflexvit_base_patch16_siglip", naflex, 224, model_args={"depth": 2})
    assert refused.value.fix == "--set teacher.stage=1, its last block"
