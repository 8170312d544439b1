"""The three kinds of pages in a real browser, at the widths of a phone and a desktop: nothing fails or overflows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch

from cae2pipe.demo import run as demo
from cae2pipe.demo.report import DemoCommand, DemoContents, demo_page
from cae2pipe.demo.student import previews_of
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.report import report_runs
from cae2pipe.stages.report_targets import report_targets
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.student import load_student

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1300)
LONG = "one_word_that_is_far_longer_than_a_phone_is_wide_" * 3

REPORTER = """<script>
const failures = [];
addEventListener("error", event => failures.push(event.message || event.target.outerHTML.slice(0, 200)), true);
addEventListener("load", () => {
  const {scrollWidth, clientWidth} = document.documentElement;
  parent.postMessage({name: window.name, scrollWidth, clientWidth, failures}, "*");
});
</script>"""
COLLECTOR = """<!doctype html><pre></pre><script>
const seen = [];
addEventListener("message", event => {
  seen.push(event.data);
  document.querySelector("pre").textContent = JSON.stringify(seen);
});
</script>"""


def looked_at(pages: dict[str, str], folder: Path) -> tuple[dict[str, dict], str]:
    """What a browser measures of each page at each width, by ``NAME WIDTH``, and its console output. One start of the
    browser shows all pages, each in a frame of its width."""
    assert BROWSER is not None
    frames = ""
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page.replace("<head>", "<head>" + REPORTER, 1), encoding="utf-8")
        frames += "".join(
            f'<iframe name="{name} {width}" src="{name}.html" style="width: {width}px; height: 900px; border: 0">'
            "</iframe>"
            for width in WIDTHS
        )
    (folder / "all.html").write_text(COLLECTOR + frames, encoding="utf-8")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command = [BROWSER, *flags, "--dump-dom", f"file://{folder / 'all.html'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    listed = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert listed is not None, done.stderr
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return {result["name"]: result for result in json.loads(unescape(listed[1]))}, said


@pytest.fixture
def page_of_demo(target_root, trained_run, photos) -> str:
    """The demo's page about a tiny set and run."""
    targets, run = TargetSet(target_root), trained_run()
    model, settings = load_student(run, targets, Silent())
    lines = read_lines(run / "metrics.jsonl")
    scores = {"loss_mean_token": 1.5, "centred_cosine_masked": 0.2, "seconds": 3.0}
    scores |= {"knn_random": 0.2, "knn_pretrained": 0.5, "knn_teacher": 0.7}
    contents = DemoContents(
        teacher=targets.teacher.name,
        codec=targets.layout.codec.name,
        grid=(targets.teacher.rows, targets.teacher.cols),
        result={**demo.stored_figures(targets), **demo.loss_figures(lines), **scores},
        losses=[(line["step"] / 5, line["loss"]) for line in lines],
        bytes_per_view=demo.codec_bytes(targets),
        stored=[demo.stored_tile(targets, photos, "class0/image001")],
        previews=previews_of(model, targets, settings, keys=["class1+image002"], device=torch.device("cpu")),
        commands=[DemoCommand("Pretrain.", f"cae2pipe pretrain {LONG}", f"cae2pipe pretrain {LONG}")],
    )
    return demo_page(contents)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_pages_fit_a_phone_and_a_desktop(target_root, trained_run, teacher_file, page_of_demo, tmp_path):
    root, run = tmp_path / LONG, tmp_path / f"run-{LONG}"
    root.symlink_to(target_root)
    run.symlink_to(trained_run())
    report_runs([run], [], [target_root], out=tmp_path / "runs", report=Silent(), device="cpu")
    report_targets(root, tmp_path / "set", report=Silent(), live=8, weights=teacher_file, device="cpu")
    pages = {"demo": page_of_demo} | {
        name: (tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("runs", "set")
    }
    results, said = looked_at(pages, tmp_path)
    assert sorted(results) == sorted(f"{name} {width}" for name in pages for width in WIDTHS)
    for name, result in results.items():
        assert result["failures"] == [], name
        assert result["clientWidth"] == int(name.split()[1])
        assert result["scrollWidth"] <= result["clientWidth"], name
    assert said == ""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_a_page_that_is_too_wide_or_fails_is_noticed(tmp_path):
    wide = '<html><head></head><body><p style="width: 500px">x</p><img src="gone.png"></body></html>'
    failing = "<html><head></head><body><script>console.error('oh'); nothing()</script></body></html>"
    results, said = looked_at({"wide": wide, "failing": failing}, tmp_path)
    assert results["wide 390"]["scrollWidth"] > 390
    assert results["wide 1300"]["scrollWidth"] <= 1300
    assert "gone.png" in results["wide 390"]["failures"][0]
    assert "nothing is not defined" in results["failing 390"]["failures"][0]
    assert "oh" in said
