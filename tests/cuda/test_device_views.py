"""Views rendered on a device: all tensors are there, and the host never waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cae2pipe.config.extract import ViewSettings
from cae2pipe.images.device_views import render_views
from cae2pipe.images.views import draw_view, render_view
from tests.cuda.simulated import on_cpu

CHOSEN = ViewSettings(size=32)


@pytest.mark.parametrize("device", [torch.device("cuda", index) for index in (0, 7)], ids=str)
def test_views_are_rendered_where_images_are_without_waiting(device, cuda, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (20 + 7 * view, 60 - view, 3), dtype=np.uint8) for view in range(12)]
    draws = [
        draw_view(CHOSEN, 0, "key", view=view, height=array.shape[0], width=array.shape[1])
        for view, array in enumerate(arrays)
    ]
    views = [render_view(Image.fromarray(array), draw, CHOSEN) for array, draw in zip(arrays, draws, strict=True)]
    wanted = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    with cuda:
        there = [torch.from_numpy(array).permute(2, 0, 1).to(device, non_blocking=True) for array in arrays]
        got = render_views(there, np.stack([draw.to_row() for draw in draws]), 32)
        assert got.device == device
        assert cuda.waits == []
        assert torch.equal(on_cpu(got), wanted)
    assert len(pinned) == 5
