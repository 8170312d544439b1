"""Python API of stage 2: runs and their encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cae2pipe.api.path_lists import Paths, encoder_name, known_pixels, local_paths, target_roots
from cae2pipe.api.settings import Overrides, resolve
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.storage import to_local_path
from cae2pipe.config.base import Settings
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import ManifestError, SettingsError
from cae2pipe.evaluation.encoders import FrozenEncoder
from cae2pipe.evaluation.encoders import load_encoder as load
from cae2pipe.methods.registry import Builder, register
from cae2pipe.models.export import CONFIG, WEIGHTS
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.stages.export import export as run_export
from cae2pipe.stages.pretrain import pretrain as train
from cae2pipe.training.metrics import METRICS_FILE, PROBE_FILE, read_lines, read_probes
from cae2pipe.training.student import run_settings


class Run:
    """A run of ``pretrain``, finished or not.

    Raises:
        ManifestError: ``path`` is not a run. BadInputError: it is the URL of a remote one.
    """

    @checked
    def __init__(self, path: str | Path):
        self.path = to_local_path(path)
        self.manifest = RunArtifact.open(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        steps = len(self.metrics())
        return f"Run({str(self.path)!r}, {'finished' if self.finished else 'unfinished'}, {steps} steps)"

    @property
    def finished(self) -> bool:
        """Whether the encoder has been written."""
        return RunArtifact.open(self.path).complete

    @property
    def settings(self) -> PretrainSettings:
        """The settings that it was trained with."""
        return run_settings(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, one per step: ``step``, ``epoch``, ``loss``, ``images_per_s``, ..."""
        return read_lines(self.path / METRICS_FILE)

    def probes(self) -> list[dict[str, Any]]:
        """The lines of ``probe.jsonl``, one per measurement during training: ``step``, ``epoch``, ``knn_top1``,
        ``held_out_loss``, ... Empty without ``probe`` and ``probe_targets``."""
        return read_probes(self.path / PROBE_FILE)

    def encoder(self) -> nn.Module:
        """Load the encoder as a timm vision transformer, in eval mode on the CPU.

        Its input is normalised by the ``mean`` and ``std`` of ``pretrained_cfg``.

        Raises:
            ManifestError: the run is not finished.
        """
        import timm

        if not all((self.path / name).is_file() for name in (WEIGHTS, CONFIG)):
            raise ManifestError(
                "this run has no encoder yet", where=self.path, fix="run pretrain again with the same arguments"
            )
        model: nn.Module = timm.create_model(f"local-dir:{self.path}", pretrained=True, num_classes=0)
        return model.eval()


@checked
def pretrain(
    targets: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    config: str | Path | Settings = "base",
    overrides: Overrides = None,
    epochs: int | None = None,
    repeat_masks: int | None = None,
    online: bool = False,
    probe: str | Path | None = None,
    probe_targets: str | Path | Sequence[str | Path] | None = None,
    every: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = True,
) -> Run:
    """Train a student from cached targets, or resume it: ``cae2pipe pretrain``.

    Args:
        targets: a target set; a path or a URL. Or several, of other teachers over the same views.
        out: the run's folder, which is local.
        config: preset, YAML file or settings.
        overrides: settings to change.
        epochs: passes over the data.
        repeat_masks: masks per loaded view and step.
        online: run the teacher in every step instead of reading its latents.
        probe: a folder with train and val, on which kNN accuracy is measured during training.
        probe_targets: a target set of held-out images, made with the same teacher, on which the loss is measured; a
            path or a URL. Or a list of those of several teachers.
        every: epochs between these measurements.
        workers: processes; -1: one per core, 0: work in this process.
        device: auto, cpu, cuda, cuda:1, ...

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    first = targets[0] if isinstance(targets, list | tuple) and targets else targets
    arguments = {
        "epochs": epochs,
        "targets": "online" if online else None,
        "mask.repeat": repeat_masks,
        "probe.images": probe,
        "probe.targets": probe_targets,
        "probe.pixels": known_pixels(probe_targets),
        "data.pixels": known_pixels(first),
        "probe.every": every,
        "speed.workers": workers,
        "speed.device": device,
    }
    settings = resolve(PretrainSettings, "pretrain", config, overrides=overrides, arguments=arguments)
    if every is not None and not settings.probe.on:
        raise SettingsError(
            f"an interval of {every} epochs is given, but nothing to measure",
            where="probe.every",
            fix="add --probe IMAGES or --probe-targets TARGETS, or omit --every",
        )
    roots = target_roots(targets)
    folder = to_local_path(out, output=True)
    with reporting(progress, "pretrain") as report:
        train(roots, folder, settings, report=report)
    return Run(folder)


@checked
def export(encoder: str | Path, out: str | Path, *, format: str = "timm", scores: Paths = ()) -> list[Path]:
    """Export an encoder for timm, open_clip or transformers (``hf``), with a model card: ``cae2pipe export``.

    Args:
        encoder: a run, an encoder.safetensors, or a .pth released by CAE's authors.
        out: the output folder.
        scores: folders with evaluations for the model card.

    Returns:
        The files that were written.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    folder = to_local_path(out, output=True)
    return run_export(encoder_name(encoder), folder, format, scores=local_paths(scores))


@checked
def load_encoder(spec: str | Path, *, device: str | torch.device = "auto", seed: int = 0) -> FrozenEncoder:
    """Load an encoder for features. ``encoder.tokens(pixels)`` and ``encoder(pixels)`` take uint8 (B, 3, S, S) on
    its device.

    Args:
        spec: a run, an encoder.safetensors, a released .pth, ``timm:NAME``, ``open_clip:NAME/TAG``, ``teacher:PRESET``,
            ``random:PRESET``, ...
        seed: for ``random:``.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    set_backends()
    return load(encoder_name(spec), seed, pick_device(str(device)))


@checked
def register_method(name: str, builder: Builder) -> None:
    """Register your own method, for the setting ``method=name``.

    Args:
        builder: makes the module from its settings and the specification of its targets.
    """
    register(name, builder)
