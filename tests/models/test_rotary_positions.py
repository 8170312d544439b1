"""Rotary positions: those of timm, and scores that depend on offsets alone."""

from __future__ import annotations

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

from cae2pipe.models.rotary_positions import rotations, turned


@pytest.mark.parametrize(("rows", "cols", "reach"), [(4, 4, 4), (3, 5, 4), (16, 16, 14), (50, 84, 14)])
def test_they_are_timms(rows, cols, reach):
    rope = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[rows, cols], ref_feat_shape=[reach, reach])
    x = torch.randn(2, 3, rows * cols, 16, generator=torch.Generator().manual_seed(0))
    wanted = apply_rot_embed_cat(x, rope.get_embed())
    found = turned(x, rotations(rows, cols, 16, reach=reach, class_token=False))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_scores_of_patches_depend_on_their_offset_and_lengths_stay():
    grid, features = 5, 8
    turns = rotations(grid, grid, features, reach=grid, class_token=True)
    q, k = torch.randn(2, features, generator=torch.Generator().manual_seed(1)).unbind()
    queries, keys = (turned(x.expand(1, 1, 1 + grid**2, -1), turns)[0, 0] for x in (q, k))
    torch.testing.assert_close(queries.norm(dim=1), q.norm().expand(1 + grid**2))
    assert torch.equal(queries[0], q)
    scores = (queries @ keys.T)[1:, 1:].view(grid, grid, grid, grid)
    for down, right in ((0, 0), (1, 0), (0, 3), (-2, 1)):
        found = torch.stack(
            [
                scores[row, col, row + down, col + right]
                for row in range(grid)
                for col in range(grid)
                if 0 <= row + down < grid and 0 <= col + right < grid
            ]
        )
        torch.testing.assert_close(found, found[:1].expand_as(found))
    assert scores.flatten(2)[0, 0].unique().numel() == grid**2


def test_chosen_tokens_have_rotations_of_their_own():
    turns = rotations(3, 3, 4, reach=3, class_token=True)
    tokens = torch.tensor([[0, 4, 9], [2, 1, 5]])
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    found = turned(x, turns[:, tokens])
    for sample, row in enumerate(tokens.tolist()):
        torch.testing.assert_close(found[sample : sample + 1], turned(x[sample : sample + 1], turns[:, row]))


def test_the_result_has_the_inputs_type():
    x = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    assert turned(x, rotations(2, 2, 8, reach=2, class_token=False)).dtype == torch.bfloat16
