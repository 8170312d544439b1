"""Replay a step whose loss or gradient was not finite, and find where it fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.artifacts.json_files import parse_json
from cae2pipe.config.base import build_recorded
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import DamageError, SettingsError
from cae2pipe.loading.batches import Batch, split
from cae2pipe.methods.registry import build_method
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.targets.codecs import Fp16Codec
from cae2pipe.training.alignment import Alignment
from cae2pipe.training.failure import load_failure, no_record
from cae2pipe.training.objective import Objective
from cae2pipe.training.step import forward
from cae2pipe.training.target_spec import TargetSpec, side_by_side


def replay(path: Path, device: str = "auto", precision: str | None = None) -> dict[str, Any]:
    """Repeat a failed step from the record that ``pretrain`` wrote.

    Args:
        path: ``failures/step-....pt`` of a run. device: where to compute. precision: fp32 or bf16; by default the
        run's.

    Returns:
        ``terms`` and ``grad_norm``: the new values, ``recorded``: the original ones; ``samples``: key, view and loss of
        the samples whose loss is not finite, or of the five with the largest loss; ``inputs``: samples whose latents
        are not finite; ``module``: the first module, in the order of computation, with an output that is not finite, or
        None; ``gradients``: weights with gradients that are not finite.

    Raises:
        DamageError: there is no such record, or its parts do not fit together. SettingsError: the precision is unknown.
    """
    if precision not in (None, "fp32", "bf16"):
        raise SettingsError(f"unknown precision {precision!r}", where="--precision", fix="use fp32 or bf16")
    batch, latents, context = load_failure(path)
    weights = context.get("weights")
    if weights is None and "-rank" in path.name:
        _, _, lead = load_failure(path.with_name(path.name.split("-rank")[0] + ".pt"))
        weights = lead.get("weights")
    if weights is None:
        raise no_record(path, "it has no weights")
    values = parse_json(context["settings"], path, fix="use another record", error=DamageError)
    settings = build_recorded(PretrainSettings, values, where=path)
    chosen_device = pick_device(device)
    bf16 = (precision or settings.precision) == "bf16"
    set_backends(bf16, deterministic=False)
    try:
        objective = _objective(settings, context, bf16)
        objective.model.load_state_dict(weights)
        return _again(
            objective.to(chosen_device).train(),
            batch.to(chosen_device),
            {name: tensor.to(chosen_device) for name, tensor in latents.items()},
            recorded=context["values"],
        )
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        reraise_exhaustion(error)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise no_record(path, f"its parts do not fit together: {reason}") from error


def _objective(settings: PretrainSettings, context: dict[str, Any], bf16: bool) -> Objective:
    """The objective of a record, with fresh weights. Its latents are decoded, so codecs do not matter."""
    known = context.get("teachers") or [{"width": context["target_dim"], "weight": 1.0, "summary": None, **context}]
    spec = side_by_side(
        [TargetSpec(each["width"], each["class_token"], each["mean"], each["summary"]) for each in known]
    )
    parts = [
        Alignment(
            settings.loss,
            Fp16Codec(),
            mean=each["mean"],
            class_token=each["class_token"],
            summary=None if each["summary"] is None else Fp16Codec(),
            pooled=each["summary"],
            weight=each["weight"],
        )
        for each in known
    ]
    model = build_method(settings.method, settings.model, spec.dim, spec.summary)
    labels = [each["label"] for each in context.get("teachers") or ()]
    return Objective(model, settings.loss, parts, labels=labels, bf16=bf16)


def _again(
    objective: Objective, batch: Batch, latents: dict[str, Tensor], *, recorded: dict[str, float]
) -> dict[str, Any]:
    model = objective.model
    broken: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, broken)) for name, module in model.named_modules() if name]
    terms = forward(objective, batch, latents)
    for hook in hooks:
        hook.remove()
    terms[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {
        "step": batch.step,
        "terms": dict(zip(objective.terms, terms.tolist(), strict=True)),
        "grad_norm": float(norm),
        "recorded": {name: recorded[name] for name in (*objective.terms, "grad_norm") if name in recorded},
        "inputs": [
            batch.keys[row]
            for row in sorted({row for latent in latents.values() for row in _bad_rows(latent, batch.weights)})
        ],
        "samples": _samples(objective, batch, latents),
        "module": broken[0] if broken else None,
        "gradients": [name for name, gradient in gradients.items() if not gradient.isfinite().all()],
    }


def _watch(name: str, broken: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            broken.append(name)

    return hook


def _bad_rows(tensor: Tensor, weights: Tensor) -> list[int]:
    bad = ~tensor.flatten(1).isfinite().all(dim=1) & (weights > 0)
    return bad.nonzero().flatten().tolist()


@torch.no_grad()
def _samples(objective: Objective, batch: Batch, latents: dict[str, Tensor]) -> list[dict[str, Any]]:
    """At most twenty samples whose own loss is not finite; if there are none, the five with the largest loss."""
    rows: list[tuple[float, str, int]] = []
    for row, part in enumerate(split(replace(batch, arrays={}), {}, len(batch.weights))):
        if batch.keys[row]:
            own = {name: latent[row : row + 1] for name, latent in latents.items()}
            loss = float(forward(objective, part, own)[0]) * batch.real
            rows.append((loss, batch.keys[row], batch.views[row]))
    bad = [row for row in rows if not math.isfinite(row[0])][:20]
    shown = bad or sorted(rows, reverse=True)[:5]
    return [{"key": key, "view": view, "loss": loss} for loss, key, view in shown]
