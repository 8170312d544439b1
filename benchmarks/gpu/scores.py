"""G: every evaluation of labelled images once, each within seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.parts import Found
from benchmarks.gpu.state import State
from benchmarks.harness import at_least, at_most
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import EVALUATIONS, FAST_RATES
from cae2pipe.evaluation.knn import knn_predictions
from cae2pipe.runtime.device import set_backends
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate


def nearest_neighbours(state: State, found: Found) -> None:
    """kNN and the fast linear probe, whose features are shared; kNN against the CPU's."""
    exact = {"features": {"precision": "fp32"}, "k": [5, 1]}
    there = score(state, found, "knn", "exact", exact)
    here = score(state, found, "knn", "on-cpu", {**exact, "speed": {"device": "cpu"}})
    agree = float((ranked(there) == ranked(here)).mean())
    found.checks.append(at_least("knn: share of images that the CPU predicts the same of", agree, 0.98))
    for kind, over in (("knn", {"k": [5, 1]}), ("linear", {"cached_crops": 1, "sweep": list(FAST_RATES)})):
        score(state, found, kind, "auto", over)
    neighbours(state, found)


def neighbours(state: State, found: Found) -> None:
    """Votes among random features are as on the CPU, even after a bfloat16 training has allowed TF32."""
    rng = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, 384, generator=rng) for count in (4000, 500))
    labels = torch.randint(0, 100, (len(train),), generator=rng)

    def shares(device: torch.device) -> torch.Tensor:
        """Shares of the first class, (500,)."""
        placed = train.to(device), labels.to(device), test.to(device)
        return knn_predictions(*placed, classes=100, k=(20,), temperature=0.07)[20][1][:, 0]

    set_backends(bf16=True)
    apart = (shares(state.place) - shares(torch.device("cpu"))).abs().mean()
    set_backends()
    found.checks.append(at_most("knn with TF32 allowed: votes against the CPU's, mean", float(apart), 1e-6, 9))


def trained(state: State, found: Found) -> None:
    """Evaluations that train on new crops: linear, attentive, and fine-tuning with Mixup and relative positions."""
    few = {"epochs": 2, "warmup_epochs": 1}
    score(state, found, "linear", "drawn", {**few, "chunk": 8})
    score(state, found, "attentive", "drawn", {**few, "chunk": 8, "lr": 10})
    batch = {"batch": 16, "chunk": 8} if state.quick else {"batch": 64, "chunk": 32}
    tuned = score(state, found, "finetune", "drawn", {"epochs": 4, "warmup_epochs": 1, "lr": 0.02, **batch})
    losses = [line["loss"] for line in tuned["history"]]
    found.checks.append(at_most("finetune: last epoch's loss over the first's", losses[-1] / losses[0], 1.05))


def score(state: State, found: Found, kind: str, name: str, over: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the random encoder on the synthetic images; adds a row, and a check that there is a result."""
    values = {"speed": {"device": state.device, "workers": 0 if state.quick else 4, "batch": 16}}
    settings = load(
        EVALUATIONS[kind],
        "evaluate",
        kind,
        overrides=(),
        values=values | {k: v for k, v in over.items() if k != "speed"},
    )
    if "speed" in over:
        settings = settings.model_copy(update={"speed": settings.speed.model_copy(update=over["speed"])})
    out = state.scratch / f"scores-{kind}-{name}"
    began = time.perf_counter()
    result = evaluate(kind, str(state.encoder()), state.labelled(), out=out, settings=settings, report=Silent())
    seconds = time.perf_counter() - began
    found.rows.append(
        {
            "evaluation": f"{kind} ({name})",
            "top1": round(result["top1"], 3),
            "losses": first_and_last(losses_of(result)),
            "seconds": round(seconds, 1),
        }
    )
    good = (out / kind / "result.json").is_file() and all(np.isfinite(losses_of(result)))
    found.check(f"{kind} ({name}) ends with a result, losses finite", bool(good))
    return {**result, "folder": str(out / kind)}


def losses_of(result: dict[str, Any]) -> list[float]:
    """Losses by epoch, if there are any."""
    return [line["loss"] for line in result["history"]] if "history" in result else result.get("losses", [])


def first_and_last(losses: list[float]) -> str:
    return f"{losses[0]:.3f} .. {losses[-1]:.3f}" if losses else ""


def ranked(result: dict[str, Any]) -> np.ndarray:
    """The predicted class of each image."""
    with np.load(Path(result["folder"]) / "predictions.npz") as archive:
        return np.asarray(archive["ranked"][:, 0])
