import json
import resource

import pytest
import timm
import torch
from safetensors import safe_open

from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from tests.faults.short_of_memory import limited

TINY = {"width": 60, "depth": 3, "heads": 5, "image_size": 32, "patch_size": 8}
SHAPES = {
    "odd heads": TINY,
    "tiny": {"width": 192, "depth": 12, "heads": 12},
    "patch 14": {"width": 32, "depth": 1, "heads": 2, "image_size": 56, "patch_size": 14},
    "relative positions": {**TINY, "relative_positions": True},
    "rotary positions": {**TINY, "rotary_positions": True},
}


def trained(**shape) -> Encoder:
    """An encoder with random values in LayerScale, biases and norms, which are constant in a new one."""
    torch.manual_seed(0)
    encoder = Encoder(**shape)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif name == "cls_token" or name.endswith("table"):
                torch.nn.init.normal_(parameter)
    return encoder.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_timm_loads_it_and_gives_the_same_outputs(tmp_path, name):
    encoder = trained(**SHAPES[name])
    export_encoder(encoder, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    side = encoder.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = encoder(pixels)
        torch.testing.assert_close(model.forward_features(pixels), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(pixels), ours[:, 0], rtol=0, atol=1e-5)
    assert model.num_features == encoder.width
    assert model.blocks[0].attn.num_heads == encoder.heads
    assert model.norm.eps == 1e-6


def test_timm_knows_how_to_prepare_its_input(tmp_path):
    export_encoder(trained(**SHAPES["odd heads"]), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert data["interpolation"] == "bicubic"


def test_timm_can_fine_tune_it(tmp_path):
    export_encoder(trained(**SHAPES["odd heads"]), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7, drop_path_rate=0.1)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_bytes_depend_on_the_encoder_alone(tmp_path):
    for folder in ("a", "b"):
        export_encoder(trained(**SHAPES["odd heads"]), tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "encoder.safetensors"]
    for name in ("config.json", "encoder.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_layer_scale_stays_and_keys_get_a_bias_of_zeros(tmp_path):
    encoder = trained(**SHAPES["odd heads"])
    export_encoder(encoder, tmp_path)
    block = encoder.blocks[1]
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("blocks.1.ls2.gamma"), block.ls2.gamma)
        assert torch.equal(file.get_tensor("blocks.1.mlp.fc2.weight"), block.mlp.fc2.weight)
        bias = file.get_tensor("blocks.1.attn.qkv.bias")
        torch.testing.assert_close(bias, torch.cat([block.attn.q_bias, torch.zeros(60), block.attn.v_bias]))
        assert file.get_tensor("pos_embed").shape == (1, 17, 60)
        assert not file.get_tensor("pos_embed")[0, 0].any()


def test_a_failed_export_leaves_the_old_one(tmp_path):
    export_encoder(trained(**SHAPES["odd heads"]), tmp_path)
    before = (tmp_path / "encoder.safetensors").read_bytes()
    with limited(resource.RLIMIT_FSIZE, 10_000), pytest.raises(OSError, match="too large"):
        export_encoder(trained(**SHAPES["patch 14"]), tmp_path)
    assert (tmp_path / "encoder.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["embed_dim"] == 60
    assert len(list(tmp_path.iterdir())) == 2
