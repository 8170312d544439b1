"""The settings class of each stage."""

from __future__ import annotations

import difflib
from pathlib import Path

from cae2pipe.config.base import Settings
from cae2pipe.errors import SettingsError

STAGES = ("shard", "extract", "pretrain", "evaluate", "compare")


def settings_class(stage: str, preset: str) -> type[Settings]:
    """The class of a stage's settings; each evaluation has its own. Raises SettingsError for an unknown stage."""
    check_stage(stage)
    if stage == "shard":
        from cae2pipe.config.extract import ShardSettings

        return ShardSettings
    if stage == "extract":
        from cae2pipe.config.extract import ExtractSettings

        return ExtractSettings
    if stage == "pretrain":
        from cae2pipe.config.pretrain import PretrainSettings

        return PretrainSettings
    if stage == "compare":
        from cae2pipe.config.compare import GridSettings

        return GridSettings
    if stage == "evaluate":
        from cae2pipe.config.dense import DENSE
        from cae2pipe.config.evaluate import EVALUATIONS, KnnSettings

        known: dict[str, type[Settings]] = {**EVALUATIONS, **DENSE}
        return next((kind for name, kind in known.items() if Path(preset).stem.startswith(name)), KnnSettings)
    raise AssertionError(stage)


def check_stage(stage: str) -> None:
    """Raise SettingsError for an unknown stage."""
    if stage in STAGES:
        return
    nearest = difflib.get_close_matches(stage, STAGES, n=1)
    raise SettingsError(
        f"unknown stage {stage!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
        fix=f"use one of {', '.join(STAGES)}",
    )
