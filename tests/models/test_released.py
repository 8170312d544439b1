"""A made-up checkpoint with the names and shapes of the authors' own."""

import pytest
import torch

from cae2pipe.errors import SourceError
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.models.released import load_released

WIDTH, DEPTH = 192, 2


def released(width: int = WIDTH, depth: int = DEPTH) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 197, width),
        "patch_embed.proj.weight": 0.02 * torch.randn(width, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(width),
        "norm.weight": torch.randn(width),
        "norm.bias": torch.randn(width),
    }
    for block in range(depth):
        own = {
            "gamma_1": torch.rand(width),
            "gamma_2": torch.rand(width),
            "norm1.weight": torch.rand(width),
            "norm1.bias": torch.randn(width),
            "attn.q_bias": torch.randn(width),
            "attn.v_bias": torch.randn(width),
            "attn.qkv.weight": 0.05 * torch.randn(3 * width, width),
            "attn.proj.weight": 0.05 * torch.randn(width, width),
            "attn.proj.bias": torch.randn(width),
            "norm2.weight": torch.rand(width),
            "norm2.bias": torch.randn(width),
            "mlp.fc1.weight": 0.05 * torch.randn(4 * width, width),
            "mlp.fc1.bias": torch.randn(4 * width),
            "mlp.fc2.weight": 0.05 * torch.randn(width, 4 * width),
            "mlp.fc2.bias": torch.randn(width),
        }
        state |= {f"blocks.{block}.{name}": tensor for name, tensor in own.items()}
    return state


def by_hand(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The forward pass as their code writes it: biases on q and v, scale on q, gammas on the branches."""
    norm = torch.nn.functional.layer_norm
    x = torch.nn.functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    ).flatten(2)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x.transpose(1, 2)], dim=1) + state["pos_embed"]
    for block in range(DEPTH):
        w = {name.split(".", 2)[2]: t for name, t in state.items() if name.startswith(f"blocks.{block}.")}
        y = norm(x, (WIDTH,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        bias = torch.cat([w["attn.q_bias"], torch.zeros(WIDTH), w["attn.v_bias"]])
        q, k, v = (y @ w["attn.qkv.weight"].T + bias).unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        attended = ((q * (WIDTH // 12) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        x = x + w["gamma_1"] * attended
        y = norm(x, (WIDTH,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = torch.nn.functional.gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + w["gamma_2"] * (y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    return norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_released_encoder_computes_what_its_authors_code_does(prefix, tmp_path):
    state = released()
    named = {prefix + name: tensor for name, tensor in state.items()}
    if prefix:
        named |= {"regresser.norm.weight": torch.ones(96), "mask_token": torch.zeros(1, 1, 96)}
    torch.save({"model": named}, tmp_path / "caev2_tiny.pth")
    encoder = load_encoder(str(tmp_path / "caev2_tiny.pth"), 0, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = by_hand(state, (pixels / 255 - mean) / std)
    found = encoder(pixels)
    torch.testing.assert_close(found.class_token, wanted[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, wanted[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blocks.1.gamma_2": None}, r"blocks\.1\.ls2\.gamma is missing"),
        ({"head.weight": torch.zeros(10, WIDTH)}, "head.weight is left over"),
        ({"norm.bias": torch.zeros(10)}, r"norm.bias is \(10,\) and not \(192,\)"),
        ({"pos_embed": None}, "no patch_embed or pos_embed"),
        ({"pos_embed": torch.zeros(1, 190, WIDTH)}, "190 positions"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, what):
    state = {name: t for name, t in {**released(), **change}.items() if t is not None}
    with pytest.raises(SourceError, match=what) as caught:
        load_released(state, tmp_path / "x.pth")
    assert caught.value.fix


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": released(), "args": slice(1)}, tmp_path / "x.pth")
    with pytest.raises(SourceError, match="could run code"):
        load_encoder(str(tmp_path / "x.pth"), 0, torch.device("cpu"))


def test_no_such_file():
    with pytest.raises(SourceError, match="no such encoder"):
        load_encoder("nowhere.pth", 0, torch.device("cpu"))
