"""CAE v2 pretraining from cached CLIP targets.

The names in ``__all__`` are what scripts and notebooks call: a function for every command, and what these return.
Importing this package loads nothing heavy; torch, timm and zarr are imported when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cae2pipe.version import __version__

if TYPE_CHECKING:
    from cae2pipe.api.comparisons import Compared, compare, report, report_targets
    from cae2pipe.api.folders import copy, inspect, repair, verify
    from cae2pipe.api.runs import Run, export, load_encoder, pretrain, register_method
    from cae2pipe.api.scores import Score, evaluate
    from cae2pipe.api.settings import presets, settings
    from cae2pipe.api.targets import estimate_targets, extract_targets, recode, shard
    from cae2pipe.loading.target_batches import TargetBatches
    from cae2pipe.shards.shard_set import ShardSet
    from cae2pipe.stages.copy_set import Copied
    from cae2pipe.stages.report_targets import TargetSetReport
    from cae2pipe.targets.target_set import TargetSet

__all__ = [
    "Compared",
    "Copied",
    "Run",
    "Score",
    "ShardSet",
    "TargetBatches",
    "TargetSet",
    "TargetSetReport",
    "__version__",
    "compare",
    "copy",
    "estimate_targets",
    "evaluate",
    "export",
    "extract_targets",
    "inspect",
    "load_encoder",
    "presets",
    "pretrain",
    "recode",
    "register_method",
    "repair",
    "report",
    "report_targets",
    "settings",
    "shard",
    "verify",
]

_WHERE = {
    "api.comparisons": ("Compared", "compare", "report", "report_targets"),
    "api.folders": ("copy", "inspect", "repair", "verify"),
    "api.runs": ("Run", "export", "load_encoder", "pretrain", "register_method"),
    "api.scores": ("Score", "evaluate"),
    "api.settings": ("presets", "settings"),
    "api.targets": ("estimate_targets", "extract_targets", "recode", "shard"),
    "loading.target_batches": ("TargetBatches",),
    "shards.shard_set": ("ShardSet",),
    "stages.copy_set": ("Copied",),
    "stages.report_targets": ("TargetSetReport",),
    "targets.target_set": ("TargetSet",),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"cae2pipe.{module}"), name)
    raise AttributeError(f"module 'cae2pipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
