"""Do cached targets train the same student?

Claim: with the same seed and the same stored views, the loss curves of a run from klt latents, of one from fp16 latents
and of one with an online teacher are equal up to the codec's error. Plots all three in one picture.

    python -m benchmarks.curves [--quick] [--picture docs/curves.png] [--out benchmarks/results/curves-cpu.json]
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.harness import at_most, finish, parse_options
from benchmarks.sample import crops, settings
from cae2pipe.config.base import load
from cae2pipe.config.extract import CodecSettings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.runtime.progress import progress
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.recode import recode
from cae2pipe.training.metrics import read_lines


def main() -> None:
    options = parse_options(
        __doc__,
        picture={"type": Path, "help": "file for the picture of the curves"},
        images={"type": int, "default": 40, "help": "images of each class"},
    )
    epochs = 3 if options.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for kind in sorted(crops(scratch).iterdir()):
            for path in sorted(kind.iterdir())[: options.images]:
                (scratch / "chosen" / kind.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, scratch / "chosen" / kind.name)
        chosen = settings(options.device, scratch, views=1, codec={"name": "fp16"})
        with progress("curves") as report:
            extract_targets(scratch / "chosen", scratch / "fp16", chosen, report=report)
            recode(scratch / "fp16", scratch / "klt", CodecSettings(fidelity=0.999), report=report)
            runs = {"klt": ("klt", "cached"), "fp16": ("fp16", "cached"), "online": ("fp16", "online")}
            losses = {}
            for name, (root, kind) in runs.items():
                weights = str(chosen.teacher.weights) if kind == "online" else None
                values = {"epochs": epochs, "targets": kind, "teacher_weights": weights}
                training = load(
                    PretrainSettings, "pretrain", "demo", overrides=[f"speed.device={options.device}"], values=values
                )
                pretrain(scratch / root, scratch / f"run-{name}", training, report=report)
                losses[name] = [line["loss"] for line in read_lines(scratch / f"run-{name}" / "metrics.jsonl")]
    rows = []
    for name, values in losses.items():
        difference = max(abs(a - b) for a, b in zip(values, losses["online"], strict=True))
        rows.append({"run": name, "first": values[0], "last": values[-1], "largest difference": round(difference, 6)})
    checks = [
        at_most("fp16 against online", rows[1]["largest difference"], 1e-3, 6),
        at_most("klt at 0.999 against online", rows[0]["largest difference"], 1e-2, 6),
    ]
    if options.picture:
        draw(losses, options.picture)
    steps = len(losses["online"])
    finish(options, "curves", rows, checks, {"steps": steps, "epochs": epochs}, ("torch", "timm"))


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """The curves, and below them the difference of each from the online run's."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
        above.plot(values, style, label=name, linewidth=1.2)
        if name != "online":
            below.semilogy([abs(a - b) for a, b in zip(values, losses["online"], strict=True)], label=name)
    above.set_ylabel("loss")
    below.set_ylabel("difference from online")
    below.set_xlabel("step")
    above.legend()
    below.legend()
    above.set_title("The same student from cached and from online targets")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
