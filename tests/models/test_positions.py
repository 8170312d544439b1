import math

import pytest
import torch

from cae2pipe.models.positions import sincos_positions


def test_positions_are_four_quarters_by_row_and_column():
    rows, cols, width = 3, 5, 16
    positions = sincos_positions(rows, cols, width)
    assert positions.shape == (15, 16)
    assert positions.dtype == torch.float32
    for row in range(rows):
        for col in range(cols):
            angles = [10000 ** -(channel / 4) for channel in range(4)]
            wanted = (
                [math.sin(row * angle) for angle in angles]
                + [math.cos(row * angle) for angle in angles]
                + [math.sin(col * angle) for angle in angles]
                + [math.cos(col * angle) for angle in angles]
            )
            assert positions[row * cols + col].tolist() == pytest.approx(wanted, abs=1e-6)


def test_every_patch_has_its_own_position():
    positions = sincos_positions(14, 14, 192)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(196)
    assert distances.min() > 0.1
