"""What reports compute on a device: their pictures, and the latents of a teacher that runs again."""

from __future__ import annotations

import re

from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.report import report_runs
from cae2pipe.stages.report_targets import report_targets


def without_pictures(page: str) -> str:
    """A page's text and figures. Its pictures may differ by rounding."""
    return re.sub(r'src="data:[^"]*"', "", page)


def test_pictures_of_a_run_of_two_teachers(wide_root, summary_root, pretrain_settings, cuda, machine, tmp_path):
    roots, run = [wide_root, summary_root], tmp_path / "run"
    pretrain(roots, run, pretrain_settings(epochs=1, optimizer={"warmup_epochs": 0}), report=Silent())
    pages = []
    for device in ("cpu", "cuda:1"):
        with cuda:
            report_runs([run], [], roots, out=tmp_path / device, report=Silent(), device=device)
        pages.append((tmp_path / device / "report.html").read_text())
    assert machine.current == 1
    assert "No pictures of" not in pages[1]
    assert "as colours" in pages[0]
    assert without_pictures(pages[0]) == without_pictures(pages[1])


def test_a_live_teacher(target_root, teacher_file, cuda, machine, tmp_path):
    pages = []
    for device in ("cpu", "cuda:1"):
        with cuda:
            report_targets(target_root, tmp_path / device, report=Silent(), live=8, weights=teacher_file, device=device)
        pages.append((tmp_path / device / "report.html").read_text())
    assert machine.current == 1
    assert without_pictures(pages[0]) == without_pictures(pages[1])
