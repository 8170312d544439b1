"""Stage 2: train the student from a target set.

Read from top to bottom: open the set and check that student and set fit, make a probe and an online teacher where the
settings ask for them, begin the run, build the model, resume from the newest checkpoint, loop over steps, export the
encoder. Under torchrun every process runs all of this on its share of each batch; the leading one writes. The teacher
only runs with ``targets: online``, as a baseline.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cae2pipe.artifacts.artifact import MANIFEST, RunArtifact, is_artifact
from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.storage import file_size
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import SettingsError, command
from cae2pipe.evaluation.initialisation import InitialWeights, initial_weights
from cae2pipe.evaluation.training_probe import TrainingProbe
from cae2pipe.loading.fresh import fresh_views
from cae2pipe.loading.joining import Joined, join_sets, labels_of
from cae2pipe.loading.planning import chosen_stores, make_plan
from cae2pipe.methods.registry import build_method
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.device import resolve_precision, set_backends
from cae2pipe.runtime.keyed import keyed_seed
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.world import World, stage_world
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import set_teacher
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, restore_training, training_state
from cae2pipe.training.compilation import compiles
from cae2pipe.training.fit import check_sets
from cae2pipe.training.objective import compile_objective, make_objective
from cae2pipe.training.online import OnlineLatents
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.parallel import wrap_model
from cae2pipe.training.pretraining import Pretraining
from cae2pipe.training.run_record import open_run
from cae2pipe.training.step import Latents, Step, cached
from cae2pipe.training.step_loop import run_steps
from cae2pipe.training.target_spec import PixelTargets, TargetSpec, target_spec
from cae2pipe.training.telemetry import check_trackers


def pretrain(
    targets_root: Path | Sequence[Path],
    out: Path,
    settings: PretrainSettings,
    *,
    report: Report,
    stores: Collection[str] | None = None,
) -> RunArtifact:
    """Train the run ``out`` on a target set, or on several of other teachers over the same views, or resume it; finally
    export ``encoder.safetensors``.

    Args:
        stores: train on no others than these; None: on all that the sets have in common.

    Raises:
        SettingsError: the student does not fit the set, or the number of processes the batch. MismatchError: the run
        was started with other settings. DamageError: stored data are damaged. DivergedError: loss or gradient is not
        finite. OutOfMemoryError: a step does not fit the device. TeacherError: the online teacher is not available.
    """
    speed = settings.speed
    with stage_world(speed.device, report, parallel=speed.parallel, patience=None) as (world, report):
        return pretrain_within(targets_root, out, settings, world=world, report=report, stores=stores)


def pretrain_within(
    targets_root: Path | Sequence[Path],
    out: Path,
    settings: PretrainSettings,
    *,
    world: World,
    report: Report,
    stores: Collection[str] | None = None,
) -> RunArtifact:
    """``pretrain`` within an initialised process group."""
    roots = list(targets_root) if isinstance(targets_root, Sequence) else [targets_root]
    world.run_on_main(lambda: refuse_target_set(out, roots))
    report.phase("opening the target set" if len(roots) == 1 else "opening the target sets")
    # Of the others only latents are read.
    pixels = [settings.data.pixels, *[None] * (len(roots) - 1)]
    joined = world.main_first(
        lambda: join_sets([TargetSet(root, pixels=folder) for root, folder in zip(roots, pixels, strict=True)])
    )
    if stores is not None:
        joined = joined.only(stores)
    targets, others = joined.main, joined.others

    def check() -> None:
        check_sets(joined, settings, world.ranks)
        if settings.views != "fresh":
            _ = targets.pixels_root

    world.run_on_main(check)
    if joined.note:
        report.log(joined.note)
    precision = resolve_precision(settings.precision, world.device)
    settings = settings.model_copy(update={"precision": precision})
    if settings.model.init:
        report.phase("loading the initial weights")
    init = world.main_first(lambda: initial_weights(settings.model))
    helpers: Helpers | None = None
    if world.run_on_main(lambda: file_size(out / MANIFEST) is None):
        # What is missing must not leave the folder of a run that has not begun.
        names = chosen_stores(targets, settings)
        helpers = make_helpers(targets, settings, others, stores=names, world=world, report=report)
    with ExitStack() as stack:
        world.run_on_main(lambda: stack.enter_context(writing(out)))
        return _train_run(joined, out, settings, helpers, init=init, world=world, report=report)


class Helpers(NamedTuple):
    """What a run uses besides the target set, if its settings ask for it."""

    probe: TrainingProbe | None
    teachers: tuple[Teacher, ...]


def refuse_target_set(out: Path, roots: Sequence[Path]) -> None:
    """Raise SettingsError if the folder for the run is a target set, one of several without a run after them."""
    if is_artifact(out, "targets"):
        new = next((root for root in roots if file_size(root / MANIFEST) is None), None)
        sets = [root for root in (*roots, out) if root != new]
        raise SettingsError(
            "this is a target set, and the folder of the run is missing"
            if new is None
            else f"this is a target set, and {new} is none: the folder of the run comes last",
            where=out,
            fix=command("pretrain", *sets, new or "RUN"),
        )


def make_helpers(
    targets: TargetSet,
    settings: PretrainSettings,
    others: Sequence[TargetSet] = (),
    *,
    stores: Sequence[str],
    world: World,
    report: Report,
) -> Helpers:
    """The helpers of a run; what it will open or import later is checked. ``settings.precision`` is resolved.
    ``stores``: those that are trained on. Raises as ``pretrain``."""

    def check() -> None:
        check_trackers(settings.track)
        with torch.device("meta"):
            spec = target_spec(settings, targets, others)
            build_method(settings.method, settings.model, spec.dim, spec.summary)
        if settings.views == "fresh":
            fresh_views(targets, settings)

    world.run_on_main(check)
    set_backends(settings.precision == "bf16", settings.speed.deterministic, fixed_shapes=True)
    probe, teachers = None, []
    if settings.probe.on:
        report.phase("trying the probe")
        probe = TrainingProbe(settings, targets, others, stores=stores, world=world, report=report)
    if settings.targets == "online":
        report.phase("loading the teachers" if others else "loading the teacher")
        sets = (targets, *others)
        for label, each in zip(labels_of(sets), sets, strict=True):
            given = f"'teacher_weights={{{label}: FILE}}'" if others else "teacher_weights=FILE"
            load = partial(
                set_teacher,
                each.artifact,
                settings.weights_of(label),
                world.device,
                option=f"--set {given}",
                layers=False,  # no loss reads earlier blocks
            )
            teachers.append(world.main_first(load))
    return Helpers(probe, tuple(teachers))


def _train_run(
    joined: Joined,
    out: Path,
    settings: PretrainSettings,
    helpers: Helpers | None,
    *,
    init: InitialWeights | None,
    world: World,
    report: Report,
) -> RunArtifact:
    targets, others = joined.main, joined.others
    artifact: RunArtifact = world.run_on_main(lambda: begin_run(out, joined, settings, init))
    if artifact.complete and artifact.has("encoder"):
        world.run_on_main(artifact.save)  # a killed run may have left entries in the journal
        report.log(f"nothing to do: {out} has a finished run of {settings.epochs} epochs")
        return artifact
    # Before the seed is set: making them must not change what is drawn later.
    stores = sorted(artifact.facts["stores"])
    probe, teachers = helpers or make_helpers(targets, settings, others, stores=stores, world=world, report=report)
    report.phase("building the model")
    torch.manual_seed(keyed_seed("init", settings.seed))
    spec = target_spec(settings, targets, others)
    model = build_method(settings.method, settings.model, spec.dim, spec.summary)
    if init:
        init.apply(model)
    model = model.to(world.device)
    model.recompute(settings.speed.recompute)
    objective = make_objective(model, targets, settings, others=others, stores=stores).to(world.device).train()
    columns = model.drop_columns + objective.columns
    plan = make_plan(targets, stores, settings, drop_columns=columns, others=others)
    compiled = compiles(settings.speed.compile, world.device)
    if compiled:
        compile_objective(objective, world)
    module = wrap_model(objective, world)
    optimizer = build_optimizer(model, settings.optimizer)
    checkpoints = checkpoints_of(out, settings, plan.steps, run=artifact.fingerprint)
    report.phase("looking for checkpoints")
    start = checkpoints.resume(
        lambda: {"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}},
        lambda state: restore_training(model, optimizer, state),
        world,
        report=report,
    )
    if start:
        report.log(f"resuming from step {start}")
    elif init:
        report.log("; ".join([f"starting from {init.name}, weights {init.digest[:16]}", *init.notes]))
    latents: Latents = cached
    if settings.loss.target == "pixels":
        latents = PixelTargets(settings.model.grid, world.device)
    if teachers:
        latents = OnlineLatents(*teachers)
    step = Step(
        module,
        objective,
        optimizer,
        axes=plan.sample_axes(),
        latents=latents,
        accumulation=settings.speed.accumulation,
        clip=settings.optimizer.clip,
        world=world,
    )
    total = plan.steps * settings.epochs
    report.phase("training")
    training = Pretraining(
        step,
        plan,
        settings,
        checkpoints=checkpoints,
        target_dim=spec.dim,
        start=start,
        out=out,
        report=report,
        probe=probe,
    )
    limit = min(total, settings.stop_after or total)
    with closing(training):
        training.begin()
        report.waits_for("the first step, which compiles the model" if compiled else "the first step")
        done = run_steps(training, start, limit, checkpoints=checkpoints, world=world, report=report)
    if done < total:
        report.log(f"stopped after {done} of {total} steps (stop_after)")
        return artifact
    report.phase("writing the encoder")
    weights = training_state(model, optimizer)["model"]
    if world.is_main:
        finish_run(artifact, settings, weights, spec)
        report.log(f"wrote {out / 'encoder.safetensors'}")
    return artifact


def checkpoints_of(out: Path, settings: PretrainSettings, steps: int, *, run: str) -> Checkpoints:
    """The checkpoints of a run with ``steps`` steps per epoch; ``run`` is its fingerprint."""
    speed = settings.speed

    def for_good(done: int) -> bool:
        return bool(speed.keep_epochs) and done % (speed.keep_epochs * steps) == 0

    return Checkpoints(out / CHECKPOINTS_FOLDER, run, speed.keep, minutes=speed.checkpoint_minutes, for_good=for_good)


def begin_run(out: Path, joined: Joined, settings: PretrainSettings, init: InitialWeights | None = None) -> RunArtifact:
    """The run's folder, created or opened, without partial files of a killed process."""
    artifact = open_run(out, joined, settings, init)
    remove_debris(out)
    return artifact


def finish_run(artifact: RunArtifact, settings: PretrainSettings, weights: dict[str, Any], spec: TargetSpec) -> None:
    """Export the encoder, and mark the run complete."""
    model = build_method(settings.method, settings.model, spec.dim, spec.summary)
    model.load_state_dict(weights)
    export_encoder(model.encoder, artifact.root)
    files = {name: file_entry(artifact.root / name) for name in ("encoder.safetensors", "config.json")}
    artifact.add("encoder", {"files": files})
    artifact.save(complete=True)
