"""A tiny exported encoder, and a run folder that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cae2pipe.artifacts.box import Box
from cae2pipe.artifacts.digest import file_entry
from cae2pipe.config.base import identity
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import CONFIG, WEIGHTS, export_encoder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported encoder of 32 pixels and width 32."""
    torch.manual_seed(3)
    folder = tmp_path / "exported"
    folder.mkdir()
    export_encoder(Encoder(width=32, depth=2, heads=2, image_size=32, patch_size=8), folder)
    return folder


@pytest.fixture
def make_run(exported: Path, tmp_path: Path, pretrain_settings):
    """A folder as ``cae2pipe pretrain`` leaves it, finished or not."""

    def make(class_token: bool = True, finished: bool = True) -> Path:
        root = tmp_path / f"run-{class_token}-{finished}"
        facts = {"stores": {}, "teacher": {"class_token": class_token}}
        box = Box(root, "run", {"settings": identity(pretrain_settings()), "targets": "none"}, facts=facts)
        box.save()
        if finished:
            for name in (WEIGHTS, CONFIG):
                (root / name).write_bytes((exported / name).read_bytes())
            box.add("encoder", {"files": {name: file_entry(root / name) for name in (WEIGHTS, CONFIG)}})
            box.save(complete=True)
        return root

    return make
