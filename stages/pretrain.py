"""Stage 2: train the student from a target set.

Read from top to bottom: open the set and check that student and set fit, build the model, go on from the newest
checkpoint, loop over steps, export the encoder. Under torchrun every process runs all of this on its share of each
batch; the leading one writes. The teacher is only here where it is asked for, as the yardstick: ``targets: online``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.box import RunBox, is_box
from cae2pipe.artifacts.digest import file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import identity, present_name
from cae2pipe.config.pretrain import PretrainSettings, TrainSpeed
from cae2pipe.errors import DivergedError, ManifestError, MismatchError, SettingsError, Terminated
from cae2pipe.images.jpeg import device_decoder
from cae2pipe.loading.batches import Batch, Plan
from cae2pipe.loading.device import on_device
from cae2pipe.loading.fresh import FreshViews
from cae2pipe.loading.loader import block_refs, load_parts
from cae2pipe.methods.registry import build_method, check_method
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.device import pick_device, resolve_precision, set_backends
from cae2pipe.runtime.device_memory import memory_advice
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report, Silent
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.signals import deferred_stop, until_stopped
from cae2pipe.runtime.world import World, joined
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.cache import BlockCache
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.training.aim import PixelTargets, aim_of
from cae2pipe.training.checkpoint import (
    load_checkpoint,
    read_checkpoint,
    restore_training,
    save_checkpoint,
    training_state,
)
from cae2pipe.training.compilation import compile_in_place, compiler_advice, compiles
from cae2pipe.training.failure import failure_path, save_failure
from cae2pipe.training.memory import explain_out_of_memory, upload_advice
from cae2pipe.training.objective import Objective
from cae2pipe.training.online import OnlineLatents
from cae2pipe.training.optimizer import build_optimizer, scaled
from cae2pipe.training.parallel import blocks_of, spread
from cae2pipe.training.schedule import learning_rate
from cae2pipe.training.step import Latents, Outcome, Step, cached
from cae2pipe.training.student import teacher_of
from cae2pipe.training.telemetry import Telemetry


def pretrain(targets_root: Path, out: Path, settings: PretrainSettings, report: Report) -> RunBox:
    """Train, or go on training, the run ``out`` on a target set; end with ``encoder.safetensors``.

    Raises:
        SettingsError: the student does not fit the set, or the processes the batch. MismatchError: the run was begun
        under other settings. DamageError: stored data are damaged. DivergedError: loss or gradient is not finite.
        OutOfMemoryError: a step does not fit the device. TeacherError: the online teacher cannot be had.
    """
    rank = torchrun_rank()
    device = pick_device(settings.speed.device, rank)
    with joined(rank, device, settings.speed.parallel, settings.data.streams) as world:
        return _pretrain(targets_root, out, settings, world, report if world.leads else Silent())


def _pretrain(targets_root: Path, out: Path, settings: PretrainSettings, world: World, report: Report) -> RunBox:
    targets = world.lead_first(lambda: TargetSet(targets_root))
    world.lead(lambda: check_fit(targets, settings, world.ranks))
    with ExitStack() as stack:
        world.lead(lambda: stack.enter_context(writing(out)))
        return _train_run(targets, out, settings, world, report)


def _train_run(targets: TargetSet, out: Path, settings: PretrainSettings, world: World, report: Report) -> RunBox:
    settings = settings.model_copy(update={"precision": resolve_precision(settings.precision, world.device)})
    bf16 = settings.precision == "bf16"
    box: RunBox = world.lead(lambda: begin(out, targets, settings))
    if box.complete and box.has("encoder"):
        report.log(f"nothing to do: {out} holds a finished run of {settings.epochs} epochs")
        return box
    set_backends(bf16, settings.speed.deterministic, fixed_shapes=True)
    torch.manual_seed(keyed_seed("init", settings.seed))
    aim = aim_of(settings, targets)
    model = build_method(settings.method, settings.model, aim.dim).to(world.device)
    model.recompute(settings.speed.recompute)
    plan = make_plan(targets, sorted(box.facts["stores"]), settings, model.drop_columns)
    objective = make_objective(model, targets, settings).to(world.device).train()
    if compiles(settings.speed.compile, world.device):
        compile_objective(objective, world)
    module = spread(objective, world)
    optimizer = build_optimizer(model, settings.optimizer)
    state: dict[str, Any] | None = None

    def newest() -> int:
        nonlocal state
        like = {"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}}
        state = load_checkpoint(out / "checkpoints", report, box.fingerprint, like)
        return state["step"] if state else 0

    start: int = world.lead(newest)
    if start:
        restore_training(model, optimizer, state or read_checkpoint(out / "checkpoints", start))
        state = None
        report.log(f"going on from step {start}")
    latents: Latents = cached
    if settings.loss.target == "pixels":
        latents = PixelTargets(settings.model.grid, world.device)
    if settings.targets == "online":
        option = "--set teacher_weights=FILE"
        weights = settings.teacher_weights
        latents = OnlineLatents(world.lead_first(lambda: set_teacher(targets.box, weights, world.device, option)))
    step = Step(
        module,
        objective,
        optimizer,
        targets.layout.sample_axes(),
        latents,
        settings.speed.accumulation,
        settings.optimizer.clip,
        world,
    )
    done = train(step, plan, settings, aim.dim, start, out, report, box.fingerprint)
    if done < plan.steps * settings.epochs:
        report.log(f"stopped after {done} of {plan.steps * settings.epochs} steps, as stop_after asks")
        return box
    weights = training_state(model, optimizer)["model"]
    if world.leads:
        finish(box, settings, weights, aim.dim)
        report.log(f"wrote {out / 'encoder.safetensors'}")
    return box


def make_objective(model: nn.Module, targets: TargetSet, settings: PretrainSettings) -> Objective:
    """The method with its loss against a set's latents, or against the pixels of its views."""
    aim, bf16 = aim_of(settings, targets), settings.precision == "bf16"
    return Objective(model, settings.loss, targets.layout.codec, aim.mean, aim.class_token, bf16)


def compile_objective(objective: Objective, world: World, backend: Any = "inductor") -> None:
    """Compile in place: all in one graph; where weights are sharded, block by block, as each is gathered by itself."""
    # Placed within the graph, its constants would make the second step compile again.
    objective.codec.place(world.device)
    compile_in_place(blocks_of(objective) if world.parallel == "fsdp" else [objective], backend)


def train(
    step: Step,
    plan: Plan,
    settings: PretrainSettings,
    target_dim: int,
    start: int,
    out: Path,
    report: Report,
    run: str = "",
) -> int:
    """Steps from ``start`` to the end, or to ``stop_after``, with metrics and checkpoints, which bear the fingerprint
    ``run``. Returns the steps done.

    On a device the outcome of a step is read when the next one has been begun, so that it never waits for the host.
    What the processes must agree on, to stop or to write a checkpoint, travels with the outcome.
    """
    world, speed = step.world, settings.speed
    total = plan.steps * settings.epochs
    limit = min(total, settings.stop_after or total)
    rates = scaled(settings.optimizer, settings.data.batch)
    telemetry = Telemetry(out, settings, target_dim, start, total, world, report) if world.leads else None

    def for_good(done: int) -> bool:
        return bool(speed.keep_epochs) and done % (speed.keep_epochs * plan.steps) == 0

    def checkpoint(done: int) -> None:
        state = training_state(step.model, step.optimizer)
        if telemetry:
            # Metrics first: a checkpoint must never be ahead of the lines it promises.
            telemetry.metrics.sync()
            save_checkpoint(out / "checkpoints", done, state, run, speed.keep, for_good)

    def settle(outcome: Outcome) -> tuple[bool, bool]:
        """Read an outcome and tell of it. Gives whether to stop, and whether a checkpoint is due."""
        values = outcome.values()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise capture(step, outcome, values, settings, target_dim, out)
        if telemetry:
            telemetry.step(outcome, values, values["sent0"] / world.ranks)
        return values["sent1"] > 0, values["sent2"] > 0

    saved_at, done = time.monotonic(), start
    pending: Outcome | None = None
    with closing(telemetry) if telemetry else nullcontext(), deferred_stop() as stop:
        parts = load_parts(plan, start, worker_count(speed.workers, most=8), world.rank, world.ranks)
        backend = "inductor" if compiles(settings.speed.compile, world.device) else None
        uploaded = on_device(parts if start < limit else iter(()), step.axes, world.device, backend)
        batches = until_stopped(with_room(uploaded, settings.loaded_batch // world.ranks, speed), stop)
        began = time.monotonic()
        for batch in batches:
            now = time.monotonic()
            due = world.leads and now - saved_at > 60 * speed.checkpoint_minutes
            sent = (now - began, float(stop.exception is not None), float(due))
            lr = learning_rate(batch.step, plan.steps, settings.epochs, *rates)
            try:
                with compiler_advice():
                    outcome: Outcome | None = step(batch, lr, sent)
            except torch.OutOfMemoryError:
                outcome = None
            if outcome is None:
                # Not where it is caught: there the failed pass still holds its memory.
                raise explain_out_of_memory(step, batch, speed.recompute)
            pending, late = (outcome, pending) if runs_ahead(world.device) else (None, outcome)
            stopping, due = settle(late) if late else (False, False)
            # Alone there is nobody to agree with.
            stopping |= world.ranks == 1 and stop.exception is not None
            done = batch.step + 1
            if stopping or done == limit:
                break
            if due or for_good(done):
                if pending:
                    settle(pending)
                    pending = None
                checkpoint(done)
                saved_at = time.monotonic()
            began = time.monotonic()
        if pending:
            settle(pending)
        if done > start:
            checkpoint(done)
        if stop.exception or done < limit:
            report.log(f"stopped after {done} steps; the same command goes on from there")
            # Another process may have been told, and not this one.
            raise stop.exception or Terminated
    return done


def with_room(batches: Iterator[Batch], views: int, speed: TrainSpeed) -> Iterator[Batch]:
    """The batches, of which ``views`` are this process's. Raises OutOfMemoryError where the device has no room for the
    next one beside what a step needs."""
    with memory_advice("the next batch", upload_advice(views, speed.accumulation, speed.recompute), "upload"):
        yield from batches


def runs_ahead(device: torch.device) -> bool:
    """Whether work is only begun when it is asked for, and done later."""
    return device.type != "cpu"


def capture(
    step: Step, outcome: Outcome, values: dict[str, float], settings: PretrainSettings, target_dim: int, out: Path
) -> DivergedError:
    """Keep a step whose loss or gradient is not finite, with the weights before it, and give the error to raise."""
    batch, world = outcome.batch, step.world
    weights = training_state(step.model, step.optimizer)["model"]
    path = failure_path(out, batch.step, world.rank)
    context: dict[str, Any] = {
        "settings": settings.model_dump_json(),
        "target_dim": target_dim,
        "class_token": step.objective.class_token,
        "mean": step.objective.mean,
        "values": values,
    }
    if world.leads:
        context["weights"] = weights
    save_failure(path, batch, {"decoded": step.objective.target(step.latents(batch))}, context)
    error = DivergedError(
        f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} at step {batch.step}: not finite; "
        "weights and optimizer were left as they were before it",
        where=path,
        fix=f"`cae2pipe replay {path}` goes through the step again and says where it breaks; where nothing in the data "
        "is wrong, lower optimizer.lr",
    )
    error.shown_elsewhere = not world.leads
    return error


def check_fit(targets: TargetSet, settings: PretrainSettings, ranks: int) -> None:
    """Refuse a student that the target set does not fit, a batch that cannot be shared out, or a decoder that is not
    installed. Raises SettingsError."""
    check_method(settings.method)
    check_parts(settings, ranks)
    if settings.data.decode == "device":
        device_decoder()
    teacher, grid = targets.teacher, settings.model.grid
    guided = settings.mask.strategy == "attention"
    if guided and not targets.layout.attention:
        raise SettingsError(
            f"masks are to follow the teacher's attention, and {teacher.name} has none",
            where=str(targets.root),
            fix="--set mask.strategy=block, or make targets with a ViT teacher",
        )
    if (guided or settings.loss.target != "pixels") and (teacher.rows, teacher.cols) != (grid, grid):
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
    if settings.data.views is not None and settings.data.views > targets.views:
        raise SettingsError(
            f"{settings.data.views} views of each image are to be trained on, and the set has {targets.views}",
            where=str(targets.root),
            fix=f"--set data.views={targets.views}, or extract more: --views {settings.data.views}",
        )
    if targets.images < settings.loaded_batch:
        raise SettingsError(
            f"the set has {targets.images} images, fewer than one batch of {settings.loaded_batch}",
            where=str(targets.root),
            fix=f"set data.batch to at most {targets.images}, and data.streams to a divisor of it; lr scales with it",
        )


def check_parts(settings: PretrainSettings, ranks: int) -> None:
    """Refuse a share of the batch that cannot be cut into equal parts. Raises SettingsError."""
    share = settings.loaded_batch // ranks
    if share % settings.speed.accumulation:
        near = max(n for n in range(1, settings.speed.accumulation + 1) if share % n == 0)
        raise SettingsError(
            f"each process loads {share} views a step, which speed.accumulation {settings.speed.accumulation} does not "
            "divide",
            where="speed.accumulation",
            fix=f"--set speed.accumulation={near}",
        )


def begin(out: Path, targets: TargetSet, settings: PretrainSettings) -> RunBox:
    """The run's folder, made or found again, without what a killed process left half-written."""
    box = open_run(out, targets, settings)
    remove_debris(out)
    return box


def finish(box: RunBox, settings: PretrainSettings, weights: dict[str, Any], target_dim: int) -> None:
    """Export the encoder, and call the run complete."""
    model = build_method(settings.method, settings.model, target_dim)
    model.load_state_dict(weights)
    export_encoder(model.encoder, box.root)
    files = {name: file_entry(box.root / name) for name in ("encoder.safetensors", "config.json")}
    box.add("encoder", {"files": files})
    box.save(complete=True)


def open_run(out: Path, targets: TargetSet, settings: PretrainSettings) -> RunBox:
    """The run's box; a new one writes down the stores it begins with, an old one must find them unchanged."""
    stores = {name: fingerprint(targets.stores[name]["files"]) for name in chosen_stores(targets, settings)}
    box = RunBox.open_or_create(
        out,
        {"settings": identity(settings), "targets": targets.box.fingerprint},
        facts={"stores": stores, "teacher": teacher_of(targets)},
        fix="give another output folder, or the settings and target set that this run was begun with",
        called=present_name,
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


def chosen_stores(targets: TargetSet, settings: PretrainSettings) -> list[str]:
    """Names of the stores that are trained on: all, or those of the first views."""
    views = settings.data.views or targets.views
    return sorted(name for name, unit in targets.stores.items() if unit["view"] < views)


def make_plan(targets: TargetSet, stores: list[str], settings: PretrainSettings, drop_columns: int) -> Plan:
    """What the loader must know, from the set and the settings.

    Raises:
        MismatchError: the originals of fresh views are not those of the set. ManifestError: there are none.
    """
    speed = settings.speed
    latents = settings.targets == "cached" and settings.loss.target != "pixels"
    arrays = tuple(targets.layout.codec.arrays()) if latents else ()
    return Plan(
        root=targets.root,
        units={name: targets.stores[name] for name in stores},
        blocks=block_refs(targets, stores),
        layout=targets.layout,
        size=targets.view_size,
        seed=settings.seed,
        epochs=settings.epochs,
        batch=settings.loaded_batch,
        streams=settings.data.streams,
        window=settings.data.window,
        last_batch=settings.data.last_batch,
        mask_strategy=settings.mask.strategy,
        grid=settings.model.grid,
        masked=settings.masked_patches,
        repeat=settings.mask.repeat,
        drop_columns=drop_columns,
        arrays=(*arrays, "norms") if arrays and settings.loss.kind != "cosine" else arrays,
        guides=("attention",) if settings.mask.strategy == "attention" else (),
        decode=settings.data.decode == "workers",
        replayed=targets.replayed,
        fresh=fresh_views(targets, settings) if settings.views == "fresh" else None,
        cache=BlockCache(speed.cache, int(speed.cache_gb * 1e9)) if speed.cache else None,
    )


def fresh_views(targets: TargetSet, settings: PretrainSettings) -> FreshViews:
    """The originals behind a target set. Raises MismatchError where they are others, ManifestError where none are."""
    root = settings.originals or targets.root / "shards"
    if not is_box(root, "shards"):
        raise ManifestError(
            "fresh views need the shard set that the targets were made from", where=root, fix="--set originals=FOLDER"
        )
    originals = ShardSet.open(root)
    shards = {shard.name: shard for shard in originals.shards}
    for name, unit in sorted(targets.stores.items()):
        found = shards.get(unit["shard"])
        if found is None or found.sha256 != unit["source"]:
            raise MismatchError(
                f"store {name} was not made from this shard set",
                where=root,
                fix="give the shard set that the targets were made from: --set originals=FOLDER",
            )
    return FreshViews(originals, shards, targets.view, settings.seed)
