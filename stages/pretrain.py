"""Stage 2: train the student from a target set.

Read from top to bottom: open the set and check that student and set fit, build the model, go on from the newest
checkpoint, loop over steps, export the encoder. The teacher is not here: its latents come from the set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.box import Box, open_or_create
from cae2pipe.artifacts.digest import file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DivergedError, MismatchError, SettingsError, WorkerError
from cae2pipe.keyed import keyed_seed
from cae2pipe.loading.batches import Batch, Plan
from cae2pipe.loading.loader import block_refs, load_batches
from cae2pipe.methods.losses import LossTerms, alignment_loss, centred_cosine
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import PIXEL_MEAN, PIXEL_STD, export_encoder
from cae2pipe.processes import worker_count
from cae2pipe.progress import Report
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.checkpoint import load_checkpoint, save_checkpoint
from cae2pipe.training.device import pick_device
from cae2pipe.training.metrics import MetricsFile
from cae2pipe.training.optimizer import build_optimizer, scaled
from cae2pipe.training.schedule import learning_rate
from cae2pipe.training.signals import StopRequest, deferred_stop


def pretrain(targets_root: Path, out: Path, settings: PretrainSettings, report: Report) -> Box:
    """Train, or go on training, the run ``out`` on a target set; end with ``encoder.safetensors``.

    Raises:
        SettingsError: the student does not fit the set. MismatchError: the run was begun under other settings.
        DamageError: stored data are damaged. DivergedError: loss or gradient is not finite.
    """
    targets = TargetSet(targets_root)
    check_fit(targets, settings)
    device = pick_device(settings.speed.device)
    settings = settings.model_copy(update={"precision": resolve_precision(settings.precision, device)})
    with writing(out):
        box = open_run(out, targets, settings)
        remove_debris(out)
        if box.complete and box.has("encoder"):
            report.log(f"nothing to do: {out} holds a finished run of {settings.epochs} epochs")
            return box
        torch.manual_seed(keyed_seed("init", settings.seed))
        model = build_method(settings.method, settings.model, targets.teacher.dim).to(device)
        optimizer = build_optimizer(model, settings.optimizer)
        plan = make_plan(targets, sorted(box.facts["stores"]), settings, model.drop_columns)
        start = 0
        if state := load_checkpoint(out / "checkpoints", report):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
            report.log(f"going on from step {start}")
        done = train(model, optimizer, plan, targets, settings, device, start, out, report)
        if done < plan.steps * settings.epochs:
            report.log(f"stopped after {done} of {plan.steps * settings.epochs} steps, as stop_after asks")
            return box
        export_encoder(model.encoder, out)
        files = {name: file_entry(out / name) for name in ("encoder.safetensors", "config.json")}
        box.add("encoder", {"files": files})
        box.save(complete=True)
        report.log(f"wrote {out / 'encoder.safetensors'}")
        return box


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    targets: TargetSet,
    settings: PretrainSettings,
    device: torch.device,
    start: int,
    out: Path,
    report: Report,
) -> int:
    """Steps from ``start`` to the end, or to ``stop_after``, with metrics and checkpoints. Returns the steps done."""
    total = plan.steps * settings.epochs
    limit = min(total, settings.stop_after or total)
    workers = worker_count(settings.speed.workers, most=8)
    step_of = Step(model, targets, settings, device)
    metrics = MetricsFile(out / "metrics.jsonl", start)
    report.total(total, "steps", done=start)
    model.train()

    def checkpoint(step: int) -> None:
        # Metrics first: a checkpoint must never be ahead of the lines it promises.
        metrics.sync()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(out / "checkpoints", step, state, settings.speed.keep)

    saved_at = time.monotonic()
    with closing(metrics), deferred_stop() as stop:
        batches = load_batches(plan, start, workers) if start < limit else iter(())
        step = start
        began = time.monotonic()
        for batch in until_stopped(batches, stop):
            waited = time.monotonic() - began
            lr = learning_rate(step, plan.steps, settings.epochs, *scaled(settings.optimizer, plan.batch))
            for group in optimizer.param_groups:
                group["lr"] = lr
            result = step_of(batch)
            optimizer.zero_grad(set_to_none=True)
            result.loss.total.backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip))
            values = result.values() | {"grad_norm": norm}
            if not all(value == value and abs(value) != float("inf") for value in values.values()):
                raise DivergedError(
                    f"loss {values['loss']:.4g}, gradient norm {norm:.4g} at step {step}: not finite",
                    where=out / "metrics.jsonl",
                    fix="lower optimizer.lr; the newest checkpoint is from before this step",
                )
            optimizer.step()
            seconds = time.monotonic() - began
            images = int(batch.weights.sum())
            rate, wait = images / seconds, waited / seconds
            line = {"step": step, "epoch": batch.epoch, **values, "lr": lr, "images": images}
            metrics.write({**line, "images_per_s": round(rate, 2), "data_wait": round(wait, 4)})
            report.advance(
                1,
                loss=values["loss"],
                visible=values["loss_visible"],
                masked=values["loss_masked"],
                cos=values["centred_cosine_masked"],
                lr=lr,
                images_per_s=rate,
                wait=wait,
            )
            step += 1
            if stop.exception or step == limit:
                break
            if time.monotonic() - saved_at > 60 * settings.speed.checkpoint_minutes:
                checkpoint(step)
                saved_at = time.monotonic()
            began = time.monotonic()
        if step > start:
            checkpoint(step)
        if stop.exception:
            report.log(f"stopped after {step} steps; the same command goes on from there")
            raise stop.exception
    return step


def until_stopped(batches: Iterator[Batch], stop: StopRequest) -> Iterator[Batch]:
    """The batches; a failure of the workers that comes with a signal is the stop that was asked for.

    A signal to the whole process group ends the server process that workers were started from, and them with it.
    """
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError, WorkerError):
        if stop.exception is None:
            raise


@dataclass(frozen=True)
class StepResult:
    """Loss and its parts (with gradient), centred cosines (without)."""

    loss: LossTerms
    centred_visible: Tensor
    centred_masked: Tensor

    def values(self) -> dict[str, float]:
        names = ("loss", "loss_visible", "loss_masked", "centred_cosine_visible", "centred_cosine_masked")
        tensors = (self.loss.total, self.loss.visible, self.loss.masked, self.centred_visible, self.centred_masked)
        # One transfer: each .item() of its own would wait for the device.
        numbers = torch.stack([tensor.detach().float() for tensor in tensors]).tolist()
        return dict(zip(names, numbers, strict=True))


class Step:
    """From a batch to the loss: to the device, normalise, decode the targets, forward, align."""

    def __init__(self, model: nn.Module, targets: TargetSet, settings: PretrainSettings, device: torch.device):
        self.model = model
        self.codec = targets.layout.codec
        self.class_token = targets.teacher.class_token
        self.settings = settings
        self.device = device
        self.mean = targets.mean.to(device)
        self.pixel_mean = torch.tensor(PIXEL_MEAN, device=device).view(1, 3, 1, 1)
        self.pixel_std = torch.tensor(PIXEL_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, batch: Batch) -> StepResult:
        batch = batch.to(self.device)
        pixels = (batch.pixels.float() / 255 - self.pixel_mean) / self.pixel_std
        target = self.codec.decode(batch.arrays)
        if "norms" in batch.arrays:
            target = target * batch.arrays["norms"].float().unsqueeze(-1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            prediction = self.model(pixels, batch.visible, batch.masked, batch.drop)
        loss = alignment_loss(
            prediction, target, batch.visible, batch.masked, self.settings.loss, batch.weights, self.class_token
        )
        with torch.no_grad():
            visible, masked = centred_cosine(
                prediction, target, batch.visible, batch.masked, self.mean, batch.weights, self.class_token
            )
        return StepResult(loss, visible, masked)


def check_fit(targets: TargetSet, settings: PretrainSettings) -> None:
    """Refuse a student that the target set does not fit. Raises SettingsError."""
    teacher, grid = targets.teacher, settings.model.grid
    if (teacher.rows, teacher.cols) != (grid, grid):
        raise SettingsError(
            f"the student's grid is {grid} x {grid} patches, and the target set's is {teacher.rows} x {teacher.cols}",
            where=f"{targets.root}, teacher {teacher.name}",
            fix=f"set model.image_size / model.patch_size so that the grid is {teacher.rows}, "
            "or make targets with a teacher that has the student's grid",
        )
    if targets.view_size != settings.model.image_size:
        raise SettingsError(
            f"the student takes {settings.model.image_size} pixels, and the stored views have {targets.view_size}",
            where=str(targets.root),
            fix=f"--set model.image_size={targets.view_size}",
        )
    if targets.images < settings.data.batch:
        raise SettingsError(
            f"the set has {targets.images} images, fewer than one batch of {settings.data.batch}",
            where=str(targets.root),
            fix=f"set data.batch to at most {targets.images}, and data.streams to a divisor of it; lr scales with it",
        )


def open_run(out: Path, targets: TargetSet, settings: PretrainSettings) -> Box:
    """The run's box; a new one writes down the stores it begins with, an old one must find them unchanged."""
    stores = {name: fingerprint(unit["files"]) for name, unit in targets.stores.items()}
    box = open_or_create(
        out,
        "run",
        {"settings": identity(settings), "targets": targets.box.fingerprint},
        facts={"stores": stores, "teacher": targets.box.facts["teacher"]},
        fix="give another output folder, or the settings and target set that this run was begun with",
    )
    for name, digest in box.facts["stores"].items():
        if stores.get(name) != digest:
            what = "is no longer in" if name not in stores else "has changed in"
            raise MismatchError(
                f"store {name}, which this run began with, {what} the target set",
                where=targets.root,
                fix="bring the target set back as it was, or start a new run in another folder",
            )
    return box


def make_plan(targets: TargetSet, stores: list[str], settings: PretrainSettings, drop_columns: int) -> Plan:
    """What the loader must know, from the set and the settings."""
    speed = settings.speed
    return Plan(
        root=targets.root,
        units={name: targets.stores[name] for name in stores},
        blocks=block_refs(targets, stores),
        layout=targets.layout,
        size=targets.view_size,
        seed=settings.seed,
        epochs=settings.epochs,
        batch=settings.data.batch,
        streams=settings.data.streams,
        window=settings.data.window,
        last_batch=settings.data.last_batch,
        mask_strategy=settings.mask.strategy,
        grid=settings.model.grid,
        masked=settings.masked_patches,
        drop_columns=drop_columns,
        norms=settings.loss.kind != "cosine",
        cache=BlockCache(speed.cache, int(speed.cache_gb * 1e9)) if speed.cache else None,
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision
