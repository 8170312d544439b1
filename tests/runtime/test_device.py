"""float32 precision: every stage sets it, whatever ran before in the process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from cae2pipe.config.extract import CodecSettings
from cae2pipe.runtime.device import exact_float32, set_backends
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.estimate_targets import estimate_targets
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.stages.repair import repair
from cae2pipe.stages.report import report_runs
from cae2pipe.stages.verify import verify, verify_live
from cae2pipe.targets.codecs import Fp16Codec, TokenKltCodec
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.training.student import load_student

CPU = torch.device("cpu")
EXACT = ("highest", False, False, False)


def backends() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture
def left_over() -> Iterator[None]:
    """The state after a bfloat16 training and after a deterministic one; restores torch's defaults."""
    set_backends(bf16=True, deterministic=True)
    torch.backends.cudnn.benchmark = True
    yield
    set_backends()
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def seen(monkeypatch) -> list[tuple[str, bool, bool, bool]]:
    """The backends at every call of a teacher or an encoding codec."""
    settings_seen = []

    def watched(real):
        def call(*arguments):
            settings_seen.append(backends())
            return real(*arguments)

        return call

    monkeypatch.setattr(Teacher, "__call__", watched(Teacher.__call__))
    for codec in (TokenKltCodec, Fp16Codec):
        monkeypatch.setattr(codec, "encode", watched(codec.encode))
    return settings_seen


def extract(photos, extract_settings, out, **over):
    return extract_targets(photos, out, extract_settings(**over), report=Silent())


def test_extraction(photos, extract_settings, tmp_path, left_over, seen):
    extract(photos, extract_settings, tmp_path / "set", views=1)
    assert set(seen) == {EXACT}


def test_estimates(photos, extract_settings, left_over, seen):
    estimate_targets(photos, extract_settings(), Silent())
    assert set(seen) == {EXACT}


def test_repair_and_the_live_audit(photos, target_root, teacher_file, tmp_path, left_over, seen):
    root = tmp_path / "set"
    shutil.copytree(target_root, root)
    next((root / "latents").rglob("*.json")).unlink()
    repair(verify(root, Silent()), Silent(), weights=teacher_file, device="cpu", workers=0)
    assert set(seen) == {EXACT}
    seen.clear()
    set_backends(bf16=True)
    verify_live(root, 10, teacher_file, device="cpu", report=Silent())
    assert set(seen) == {EXACT}


def test_recoding(photos, extract_settings, tmp_path, left_over, seen):
    extract(photos, extract_settings, tmp_path / "fp16", views=1, codec={"name": "fp16"})
    seen.clear()
    set_backends(bf16=True, deterministic=True)
    recode(tmp_path / "fp16", tmp_path / "klt", CodecSettings(calibration=64), report=Silent(), workers=0)
    assert set(seen) == {EXACT}


def test_reports(target_root, pretrain_settings, tmp_path, left_over, monkeypatch):
    pretrain(target_root, tmp_path / "run", pretrain_settings(), report=Silent())
    set_backends(bf16=True, deterministic=True)
    settings_seen = []

    def watched(*arguments):
        settings_seen.append(backends())
        return load_student(*arguments)

    monkeypatch.setattr("cae2pipe.stages.report.load_student", watched)
    report_runs([tmp_path / "run"], [], [target_root], out=tmp_path / "report", report=Silent(), device="cpu")
    assert settings_seen == [EXACT]


def test_the_online_teacher_of_a_bfloat16_student(target_root, teacher_file, pretrain_settings, tmp_path, seen):
    over = {"targets": "online", "precision": "bf16", "teacher_weights": str(teacher_file), "stop_after": 2}
    try:
        pretrain(target_root, tmp_path / "run", pretrain_settings(**over), report=Silent())
        assert [kept[:2] for kept in seen] == [("highest", False)] * 2
        assert backends()[:2] == ("high", True)
    finally:
        set_backends()
        torch.backends.cudnn.allow_tf32 = True


def test_training_tunes_cudnn_where_it_need_not_repeat(left_over):
    set_backends(bf16=True, fixed_shapes=True)
    assert backends() == ("high", True, True, False)
    set_backends(bf16=True, deterministic=True, fixed_shapes=True)
    assert backends() == ("high", True, False, True)


def test_what_decides_is_float32_under_autocast(left_over):
    one = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        with exact_float32(CPU):
            assert (one @ one).dtype == torch.float32
            assert backends()[:2] == ("highest", False)
        assert (one @ one).dtype == torch.bfloat16
    assert backends()[:2] == ("high", True)
