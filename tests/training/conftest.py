import pytest
import torch

from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.loading.batches import Batch
from cae2pipe.loading.loader import load_batches
from cae2pipe.loading.planning import make_plan
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.world import World
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import make_objective
from cae2pipe.training.optimizer import build_optimizer
from cae2pipe.training.step import Step, cached
from cae2pipe.training.target_spec import target_spec

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def targets(target_root) -> TargetSet:
    return TargetSet(target_root)


@pytest.fixture
def make(targets):
    """A training step and its batches, for given settings."""

    def built(settings: PretrainSettings) -> tuple[Step, list[Batch]]:
        torch.manual_seed(0)
        spec = target_spec(settings, targets)
        model = build_method(settings.method, settings.model, spec.dim, spec.summary)
        model.recompute(settings.speed.recompute)
        objective = make_objective(model, targets, settings).train()
        plan = make_plan(targets, sorted(targets.stores), settings, drop_columns=model.drop_columns)
        step = Step(
            objective,
            objective,
            build_optimizer(model, settings.optimizer),
            axes=plan.sample_axes(),
            latents=cached,
            accumulation=settings.speed.accumulation,
            clip=settings.optimizer.clip,
            world=World(0, 1, CPU),
        )
        return step, list(load_batches(plan, 0, 0))

    return built
