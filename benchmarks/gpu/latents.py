"""E1, E2: are the teacher's latents and their codec the same on the device and on the CPU?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_least, at_most
from benchmarks.sample import rendered
from cae2pipe.runtime.device import set_backends
from cae2pipe.targets.calibration import calibrate, make_codec
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.codecs import as_tensors, unit_tokens, unzigzag
from cae2pipe.teachers.load import load_teacher
from cae2pipe.teachers.protocol import Teacher, TeacherOutput

CODECS = ("klt", "int8", "fp16")


def teacher(state: State, found: Found) -> None:
    """Tokens and attention of a block of views: float32 on the device compared with the CPU, and half precisions
    compared with float32; also float32 with torch's default flags, which allow TF32 in convolutions."""
    settings = state.clip_settings()
    pixels = rendered(state.shards(), settings, 1)[0].pixels[0]
    set_backends()
    here = run(teacher_at(state, "cpu", "fp32"), pixels)
    full = run(teacher_at(state, state.device, "fp32"), pixels)
    row = agreement(full, here)
    found.rows.append({"what": "fp32 against the CPU's", **row})
    found.checks += [
        at_least("fp32 tokens against the CPU's: cosine, mean", row["mean"], 0.99999, 8),
        at_least("fp32 tokens against the CPU's: cosine, worst", row["worst"], 0.9999, 7),
        at_least("fp32 attention against the CPU's: correlation, worst", row["attention"], 0.999, 7),
    ]
    torch.backends.cudnn.allow_tf32 = True
    found.rows.append(
        {"what": "fp32 under torch's flags", **agreement(run(teacher_at(state, state.device, "fp32"), pixels), here)}
    )
    set_backends()
    for precision, goal in (("fp16", 0.999), ("bf16", 0.99)):
        row = agreement(run(teacher_at(state, state.device, precision), pixels), full)
        found.rows.append({"what": f"{precision} against fp32", **row})
        found.checks.append(at_least(f"{precision} tokens against fp32's: cosine, mean", row["mean"], goal, 6))


def teacher_at(state: State, device: str, precision: str) -> Teacher:
    settings = state.clip_settings(teacher={"precision": precision}).teacher
    return load_teacher(settings, torch.device(device))


def run(teacher: Teacher, pixels: Tensor) -> TeacherOutput:
    """The teacher's output, on the CPU."""
    found = teacher(pixels.to(teacher.device))
    return TeacherOutput(found.tokens.cpu(), None if found.attention is None else found.attention.cpu())


def agreement(got: TeacherOutput, wanted: TeacherOutput) -> dict[str, float]:
    """Cosines of tokens: mean, 1st percentile, worst; and the worst correlation of an image's attention."""
    cosines = torch.cosine_similarity(got.tokens.double(), wanted.tokens.double(), dim=-1).flatten().sort().values
    assert got.attention is not None
    assert wanted.attention is not None
    centred = [maps.double() - maps.double().mean(dim=1, keepdim=True) for maps in (got.attention, wanted.attention)]
    found = {
        "mean": float(cosines.mean()),
        "p1": float(cosines[len(cosines) // 100]),
        "worst": float(cosines[0]),
        "attention": float(torch.cosine_similarity(*centred, dim=1).min()),
    }
    return {name: round(value, 8) for name, value in found.items()}


def codecs(state: State, found: Found) -> None:
    """The same tokens encoded and decoded on the device and on the CPU."""
    torch.manual_seed(0)
    count, dim = (8, 16) if state.quick else (BLOCK, 512)
    tokens = state.scale.image**2 // state.scale.patch**2 + 1
    # A few directions with decreasing weights, as in latents.
    mixing = torch.randn(dim, dim) * torch.linspace(1, 0.05, dim)[:, None]
    unit, _ = unit_tokens(torch.randn(2 * count, tokens, dim) @ mixing + 0.5)
    fit, test = unit[:count], unit[count:]
    for name in CODECS:
        calibration, _ = calibrate(fit, name, 0.999, level=1)
        codec = make_codec(name, calibration)
        here, there = codec.encode(test), codec.encode(test.to(state.place))
        first, second = (torch.from_numpy(arrays[codec.main].astype("f8")) for arrays in (here, there))
        if name == "klt":
            first, second = (unzigzag(symbols.long()).double() for symbols in (first, second))
        apart = (first - second).abs()
        stored = as_tensors(here)
        placed = {key: tensor.to(state.place) for key, tensor in stored.items()}
        wanted = codec.decode(stored)
        off = float((codec.decode(placed).cpu() - wanted).abs().max())
        set_backends(bf16=True)
        rough = float((codec.decode(placed).cpu() - wanted).abs().max())
        set_backends()
        share = float((apart > 0).double().mean())
        found.rows.append(
            {"codec": name, "symbols that differ": share, "by": float(apart.max()), "decoded": off, "with TF32": rough}
        )
        found.checks += [
            at_most(f"{name}: share of symbols that differ", share, 1e-4, 8),
            at_most(f"{name}: by", float(apart.max()), 1 if name != "fp16" else 1e-3, 5),
            at_most(f"{name}: decoded, largest difference", off, 1e-6, 9),
            at_most(f"{name}: decoded with TF32, largest difference", rough, 5e-4, 7),
        ]
