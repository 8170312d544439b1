"""What does a second teacher add to a training step?

Claim: a step with two teachers takes at most 1.05 times the step with one plus the second head and loss alone. All are
measured in turns, with the loader of `pretrain`: one target set, two over the same views, and a step whose student is
the second head on fixed tokens. Teachers are CLIP ViT-B/16 and DINOv3 ViT-B/16 with random weights, on which speed does
not depend.

    python -m benchmarks.teacher_step [--quick] [--device cpu] [--sizes tiny,small] [--batch 8] [--out FILE.json]
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import at_most, figures, finish, in_turns, median_ratio, parse_options
from benchmarks.pretrain import make_targets, settings_of, turn
from benchmarks.sample import copies, packed, photographs
from cae2pipe.config.base import load
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.device import on_device
from cae2pipe.loading.joining import join_sets
from cae2pipe.loading.loader import load_parts
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method, latent_head
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import pick_device
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Silent
from cae2pipe.runtime.world import World
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import compile_objective, make_objective
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Step, cached
from cae2pipe.training.target_spec import target_spec

FIRST, SECOND = "clip-b16", "dinov3-b16"


class HeadAlone(nn.Module):
    """The head of one teacher on fixed tokens, with the gradient that the rest of a student would take from it."""

    drop_columns = 0

    def __init__(self, settings: ModelSettings, dim: int, tokens: Tensor, hidden: Tensor):
        super().__init__()
        self.head = latent_head(settings, settings.predictor_width, dim)
        self.fixed = tokens, hidden

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor) -> Prediction:
        seen, hidden = (self.head(each.detach().requires_grad_()) for each in self.fixed)
        return Prediction(seen[:, :1], seen[:, 1:], hidden)


def main() -> None:
    options = parse_options(
        __doc__,
        sizes={"default": "tiny,small", "help": "sizes to measure"},
        batch={"type": int, "default": 8, "help": "images per step"},
        steps={"type": int, "default": 0, "help": "steps per turn; 0: 4 on a CPU, 50 on a device"},
    )
    device = pick_device(options.device)
    rows, checks = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sets = make_sets(scratch, options)
        for size in options.sizes.split(","):
            row = measure(size, sets, options, device)
            rows.append(row)
            checks.append(at_most(f"{size}: two teachers over one and the second head", row["ratio"], 1.05))
            gc.collect()
    finish(options, "teacher_step", rows, checks, {"batch": options.batch}, ("torch", "timm", "open_clip_torch"))


def make_sets(scratch: Path, options: Any) -> list[TargetSet]:
    """Target sets of both teachers, one view per image: the second from the stored views of the first."""
    from safetensors.torch import save_file
    from timm import create_model

    source = copies(photographs(scratch, 100), scratch, max(1, -(-options.batch // 32)))
    first, _ = make_targets(
        packed(source, scratch, load(ExtractSettings, "extract", FIRST)), scratch, FIRST, options.device
    )
    torch.manual_seed(0)
    chosen = load(ExtractSettings, "extract", SECOND)
    weights = scratch / f"{SECOND}.safetensors"
    save_file(create_model(chosen.teacher.name).state_dict(), weights)
    values = {"teacher": {"weights": str(weights)}, "speed": {"device": options.device}}
    second = load(ExtractSettings, "extract", SECOND, overrides=(), values=values)
    extract_targets(first.root, scratch / SECOND, second, report=Silent())
    return [first, TargetSet(scratch / SECOND)]


def measure(size: str, sets: Sequence[TargetSet], options: Any, device: torch.device) -> dict[str, Any]:
    """The row of one size: milliseconds per step, in turns."""
    steps = options.steps or (4 if device.type == "cpu" else 50)
    settings = settings_of(size, options.batch, device)
    world = World(0, 1, device)

    def steps_of(chosen: Sequence[TargetSet], model: nn.Module, batches: Iterator[Batch]) -> Callable[[], float]:
        objective = make_objective(model, chosen[0], settings, others=chosen[1:]).to(device).train()
        if device.type == "cuda":
            compile_objective(objective, world)
        optimizer = build_optimizer(model, settings.optimizer)
        step = Step(objective, objective, optimizer, axes={}, latents=cached, accumulation=1, clip=3.0, world=world)
        images_per_second = turn(step, batches, steps, device)
        return lambda: 1000 * options.batch / images_per_second()

    def student_of(chosen: Sequence[TargetSet]) -> Method:
        torch.manual_seed(0)
        spec = target_spec(settings, chosen[0], chosen[1:])
        return build_method(settings.method, settings.model, spec.dim, spec.summary).to(device)

    def stream(chosen: Sequence[TargetSet], columns: int) -> Iterator[Batch]:
        joined = join_sets(chosen)
        names = sorted(joined.main.stores)
        plan = make_plan(joined.main, names, settings, drop_columns=columns, others=joined.others)
        return on_device(load_parts(plan, 0, worker_count(-1)), plan.sample_axes(), device)

    def with_loader(chosen: Sequence[TargetSet]) -> Callable[[], float]:
        model = student_of(chosen)
        return steps_of(chosen, model, stream(chosen, model.drop_columns))

    def of_head() -> Callable[[], float]:
        batch = next(stream(sets[1:], student_of(sets[1:]).drop_columns))
        width, shape = settings.model.predictor_width, batch.visible.shape
        seen = torch.randn(shape[0], 1 + shape[1], width, device=device)
        hidden = torch.randn(*batch.masked.shape, width, device=device)
        model = HeadAlone(settings.model, sets[1].teacher.dim, seen, hidden).to(device)
        return steps_of(sets[1:], model, iter(lambda: batch, None))

    times = in_turns(
        {"one": with_loader(sets[:1]), "head": of_head(), "two": with_loader(sets)}, 2 if options.quick else 7
    )
    alone = [one + head for one, head in zip(times["one"], times["head"], strict=True)]
    row = {f"{name} ms": figures(values) for name, values in times.items()}
    return {"size": size, **row, "ratio": round(median_ratio(times["two"], alone), 3)}


if __name__ == "__main__":
    main()
