"""A random checkpoint with the authors' names and shapes."""

import argparse
import zipfile
from pathlib import Path

import numpy as np
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
    """The forward pass as in their code: biases on q and v, scale on q, gammas on the branches."""
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
        ({"head.weight": torch.zeros(10, WIDTH)}, "head.weight is unexpected"),
        ({"norm.bias": torch.zeros(10)}, r"norm.bias has shape \(10,\), expected \(192,\)"),
        ({"pos_embed": None}, "no patch_embed or pos_embed"),
        ({"pos_embed": torch.zeros(1, 190, WIDTH)}, "190 positions"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, what):
    state = {name: t for name, t in {**released(), **change}.items() if t is not None}
    with pytest.raises(SourceError, match=what) as caught:
        load_released(state, tmp_path / "x.pth")
    assert caught.value.fix


def save_model(path: Path, state: dict[str, torch.Tensor]) -> None:
    """As written by ``utils.save_model`` of the authors' repository after their engine has set learning rates, which
    numpy computed."""
    parameters = [torch.nn.Parameter(tensor) for tensor in state.values()]
    optimizer = torch.optim.AdamW(parameters[:2], lr=1e-3, betas=(0.9, 0.98))
    (parameters[0].sum() + parameters[1].sum()).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = np.linspace(0, 1e-3, 5)[3] * np.float32(1.0), np.float64(0.05)
    args = argparse.Namespace(
        model="cae_base", epochs=300, opt_betas=[0.9, 0.98], window_size=(14, 14), clip_grad=None, lr=np.float64(1.5e-3)
    )
    scaler = torch.amp.GradScaler("cpu")
    torch.save(
        {
            "model": {f"encoder.{name}": tensor for name, tensor in state.items()},
            "optimizer": optimizer.state_dict(),
            "epoch": np.int64(299),
            "scaler": scaler.state_dict(),
            "args": args,
        },
        path,
    )


def as_numpy_1_wrote_it(path: Path) -> None:
    """Uses the name that numpy 1 has for the constructor of numpy's numbers."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    [pickled] = [name for name in members if name.endswith("data.pkl")]
    assert b"cnumpy._core.multiarray\nscalar" in members[pickled]
    members[pickled] = members[pickled].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("older", [False, True])
def test_what_their_save_model_writes(older, tmp_path):
    state, path = released(), tmp_path / "caev2_tiny_300e_checkpoint-299.pth"
    save_model(path, state)
    if older:
        as_numpy_1_wrote_it(path)
    encoder = load_encoder(str(path), 0, torch.device("cpu"))
    found = encoder.model.state_dict()
    assert torch.equal(found["blocks.1.ls2.gamma"], state["blocks.1.gamma_2"])
    assert torch.equal(found["blocks.1.mlp.fc2.weight"], state["blocks.1.mlp.fc2.weight"])


@pytest.mark.parametrize(
    ("value", "name"),
    [(slice(1), "slice"), (Path("x"), "pathlib"), (np.array([None], dtype=object), "numpy")],
)
def test_a_file_that_could_run_code_is_refused_and_what_it_holds_is_named(value, name, tmp_path):
    torch.save({"model": released(), "args": argparse.Namespace(value=value)}, tmp_path / "x.pth")
    with pytest.raises(SourceError, match="could run code") as caught:
        load_encoder(str(tmp_path / "x.pth"), 0, torch.device("cpu"))
    assert f"({name}" in caught.value.what


def test_no_such_file():
    with pytest.raises(SourceError, match="no such encoder"):
        load_encoder("nowhere.pth", 0, torch.device("cpu"))
