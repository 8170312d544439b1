"""Extraction on a device: every teacher, every codec, and their blocks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cae2pipe.config.base import load
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.targets import encoding
from cae2pipe.targets.calibration import calibrate, make_codec
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens
from cae2pipe.targets.encoding import Meter, encode_ahead
from cae2pipe.targets.groups import Group
from cae2pipe.targets.rendering import RenderedBlock, Task
from cae2pipe.targets.store_layout import StoreLayout
from cae2pipe.teachers.load import load_teacher
from cae2pipe.training.online import OnlineLatents
from tests.cuda.simulated import on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CODECS = ("fp16", "int8", "klt")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def teachers(extract_settings, tmp_path_factory) -> dict[str, TeacherSettings]:
    """One of each kind, for small images."""
    folder = tmp_path_factory.mktemp("weights")
    lite0 = load(ExtractSettings, "extract", "lite0", overrides=["teacher.image_size=32"]).teacher
    torch.manual_seed(0)
    models = {"vit": timm.create_model("test_vit", img_size=32), "lite0": load_teacher(lite0, CPU).model}
    for name, model in models.items():
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return {
        "open_clip": extract_settings().teacher,
        "timm": TeacherSettings(kind="timm", name="test_vit", weights=folder / "vit.safetensors", image_size=32),
        # From a file: with fake tensors, torch.load of the package's weights would return fake ones.
        "lite0": lite0.model_copy(update={"weights": folder / "lite0.safetensors"}),
    }


def pixels(count: int = 9, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ["open_clip", "timm", "lite0"])
def test_teachers(kind, precision, teachers, cuda):
    settings = teachers[kind].model_copy(update={"precision": precision})
    wanted = load_teacher(settings.model_copy(update={"precision": "fp32"}), CPU)(pixels(side=40))
    with cuda:
        teacher = load_teacher(settings, CUDA)
        images = pixels(side=40).to(CUDA)  # brought to its size on the device
        cuda.waits.clear()
        output = teacher(images)
        assert cuda.waits == []
        got = output.tokens, output.attention
    # Attention over the class token is always computed in float32.
    attends = output.attention is not None
    assert attends is (wanted.attention is not None) is (kind != "lite0")
    assert set(cuda.products) == {DTYPES[precision]} | ({torch.float32} if attends else set())
    for tensor, expected in zip(got, (wanted.tokens, wanted.attention), strict=True):
        if tensor is not None:
            assert (tensor.device, tensor.dtype) == (CUDA, torch.float32)
            cosine = F.cosine_similarity(on_cpu(tensor), expected, dim=-1).mean().item()
            assert cosine == pytest.approx(1, abs=1e-5 if precision == "fp32" else 5e-3)


# By architecture: rotary or relative positions, registers, pooling by attention, feature maps; and other settings.
FAMILIES = {
    "vit_small_patch16_dinov3": {"layers": (1,)},
    "vit_base_patch16_siglip_224": {"grid": (3, 3)},
    "vit_pe_core_tiny_patch16_384": {},
    "eva02_base_patch16_clip_224": {"project": False},
    "vit_base_patch16_radio_v3": {"grid": (3, 3)},
    "beitv2_base_patch16_224": {"layers": (1,)},
    "convnext_atto": {"stage": 3},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_teachers_of_today(name, cuda, tmp_path):
    """The views are enlarged to the teacher's size on the device; latents and the summary are the CPU's."""
    vit = not name.startswith("convnext")
    shape = {"depth": 2, "embed_dim": 64, "num_heads": 2} if vit else {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 16]}
    torch.manual_seed(0)
    model = timm.create_model(name, **shape, **({"img_size": 96} if vit else {}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = TeacherSettings(
        kind="timm",
        name=name,
        weights=tmp_path / "model.safetensors",
        image_size=96,
        model_args=shape,
        precision="fp32",
        **FAMILIES[name],
    )
    wanted = load_teacher(settings, CPU)(pixels(2, 48))
    with cuda:
        teacher = load_teacher(settings.model_copy(update={"precision": "bf16"}), CUDA)
        images = pixels(2, 48).to(CUDA)
        cuda.waits.clear()
        output = teacher(images)
        assert cuda.waits == []
        got = output.tokens, output.summary
    for tensor, expected in zip(got, (wanted.tokens, wanted.summary), strict=True):
        assert (tensor is None) is (expected is None)
        if tensor is not None:
            assert (tensor.device, tensor.dtype) == (CUDA, torch.float32)
            assert F.cosine_similarity(on_cpu(tensor), expected, dim=-1).mean().item() == pytest.approx(1, abs=5e-3)


def test_a_teacher_in_the_step(teachers, cuda):
    """Its latents take part in a backward pass, which is impossible for tensors from inference mode."""
    with cuda:
        teacher = load_teacher(teachers["open_clip"], CUDA)
        latents = OnlineLatents(teacher)(SimpleNamespace(pixels=pixels().to(CUDA)))["raw"]
        assert (latents.device, latents.is_inference()) == (CUDA, False)
        weight = torch.ones((), device=CUDA, requires_grad=True)
        (weight * latents).sum().backward()
        assert weight.grad is not None


@pytest.fixture(scope="module")
def unit() -> Tensor:
    """Unit tokens with a mean and unlike variances."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(BLOCK, 17, 16, generator=generator) * torch.linspace(2, 0.1, 16) + 0.3
    return unit_tokens(raw)[0]


@pytest.mark.parametrize("name", CODECS)
def test_codecs_write_and_read_the_same_on_a_device(name, unit, cuda):
    calibration, _ = calibrate(unit, name, 0.999, level=1)
    plain, codec = make_codec(name, calibration), make_codec(name, calibration)
    arrays = plain.encode(unit)
    with cuda:
        arrays_there = codec.encode(unit.to(CUDA))
        assert {array: data.tobytes() for array, data in arrays_there.items()} == {
            array: data.tobytes() for array, data in arrays.items()
        }
        stored = {array: data.to(CUDA) for array, data in as_tensors(arrays).items()}
        cuda.waits.clear()
        decoded = codec.decode(stored)
        assert cuda.waits == []
        assert (decoded.device, decoded.dtype) == (CUDA, torch.float32)
    assert torch.equal(on_cpu(decoded), plain.decode(as_tensors(arrays)))


@pytest.mark.parametrize("name", CODECS)
def test_blocks_are_those_of_the_cpu(name, unit, teachers, cuda, monkeypatch):
    """All of it: upload, teacher, norms, codec, check of the decoding, attention, packing."""
    # Other threads do not know of what is simulated in this one.
    monkeypatch.setattr(encoding, "in_threads", lambda work, tasks, *_, **__: (work(*task) for task in tasks))
    calibration, _ = calibrate(unit, name, 0.999, level=1)
    settings = teachers["open_clip"].model_copy(update={"precision": "fp32"})

    def blocks(teacher, codec):
        task = Task(SimpleNamespace(name="shard"), 0, (0, 1))
        views = [pixels(5), pixels(5).flip(0)]
        rendered = RenderedBlock(task, ["key"] * 5, np.zeros(5), [], views, [])
        layout = StoreLayout(17, 16, 16, True, codec)
        groups = {"patches": Group(layout, calibration)}
        return list(encode_ahead(iter([rendered]), teacher, groups, meter=Meter(), lanes=2))

    wanted = blocks(load_teacher(settings, CPU), make_codec(name, calibration))
    with cuda:
        encoded = blocks(load_teacher(settings, CUDA), make_codec(name, calibration))
    assert [block.view for block in encoded] == [0, 1]
    for one, other in zip(encoded, wanted, strict=True):
        assert one.chunks == other.chunks
        torch.testing.assert_close(one.cosines, other.cosines)
