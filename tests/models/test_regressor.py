import math

import pytest
import torch
import torch.nn.functional as F

from cae2pipe.models.positions import sincos_positions
from cae2pipe.models.regressor import Regressor

WIDTH, HEADS, GRID = 20, 3, 4
VISIBLE = torch.tensor([[0, 3, 7, 12, 13], [1, 2, 5, 14, 15]])
MASKED = torch.tensor([[1, 2, 4], [0, 6, 9]])


def build(**over) -> Regressor:
    """A regressor with all parameters changed from their initial values."""
    torch.manual_seed(0)
    regressor = Regressor(**({"width": WIDTH, "depth": 2, "heads": HEADS, "grid": GRID} | over))
    with torch.no_grad():
        for parameter in regressor.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return regressor


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def by_hand(regressor: Regressor, context, visible, masked):
    """The released code's block, written out: attention head by head, no shared code."""
    table = sincos_positions(GRID, GRID, WIDTH)
    count = regressor.blocks[0].attn.heads
    size = WIDTH // count
    result = []
    for sample in range(len(context)):
        x = regressor.mask_token[0, 0].repeat(masked.shape[1], 1)
        for block in regressor.blocks:

            def norm(module, value):
                return F.layer_norm(value, (WIDTH,), module.weight, module.bias, 1e-6)

            both = torch.cat([context[sample], x])
            where = torch.cat([table[visible[sample]], table[masked[sample]]])
            attn = block.attn
            q = norm(block.norm_q, x + table[masked[sample]]) @ attn.q.weight.T + attn.q_bias
            k = norm(block.norm_k, both + where) @ attn.k.weight.T
            v = norm(block.norm_v, both) @ attn.v.weight.T + attn.v_bias
            heads = []
            for head in range(count):
                part = slice(head * size, (head + 1) * size)
                query, key = q[:, part], k[:, part]
                if regressor.places.turns is not None:
                    query = turned_by_hand(query, masked[sample].tolist())
                    key = turned_by_hand(key, [*visible[sample].tolist(), *masked[sample].tolist()])
                scores = query @ key.T / size**0.5
                if attn.relative_position_bias_table is not None:
                    scores = scores + offsets(attn.relative_position_bias_table[:, head], visible, masked, sample)
                heads.append(scores.softmax(dim=-1) @ v[:, part])
            x = x + block.ls1.gamma * (torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias)
            x = norm(block.norm2, x)
            hidden = F.gelu(x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            x = x + block.ls2.gamma * (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        result.append(x)
    return torch.stack(result)


def offsets(table, visible, masked, sample):
    """The biases from each masked patch to the visible and the masked ones."""
    keys = [*visible[sample].tolist(), *masked[sample].tolist()]
    pairs = [[(q // GRID - k // GRID, q % GRID - k % GRID) for k in keys] for q in masked[sample].tolist()]
    return torch.stack([torch.stack([table[(down + 3) * 7 + right + 3] for down, right in row]) for row in pairs])


def test_relative_positions_bias_its_scores(context):
    regressor = build(relative_positions=True)
    assert regressor.blocks[1].attn.relative_position_bias_table.shape == (49, HEADS)
    torch.testing.assert_close(
        regressor(context, VISIBLE, MASKED), by_hand(regressor, context, VISIBLE, MASKED), rtol=1e-4, atol=1e-4
    )


def turned_by_hand(x, patches):
    """Heads of four features: the first two are turned by the patch's row, the others by its column, in radians."""
    result = []
    for feature, patch in zip(x, patches, strict=True):
        turned = []
        for (a, b), place in zip(feature.view(2, 2), divmod(patch, GRID), strict=True):
            cos, sin = math.cos(place), math.sin(place)
            turned += [a * cos - b * sin, a * sin + b * cos]
        result.append(torch.stack(turned))
    return torch.stack(result)


def test_rotary_positions_turn_its_queries_and_keys(context):
    regressor = build(heads=WIDTH // 4, rotary_positions=True)
    torch.testing.assert_close(
        regressor(context, VISIBLE, MASKED), by_hand(regressor, context, VISIBLE, MASKED), rtol=1e-4, atol=1e-4
    )


def test_it_is_the_released_codes_regressor(context):
    regressor = build()
    torch.testing.assert_close(
        regressor(context, VISIBLE, MASKED), by_hand(regressor, context, VISIBLE, MASKED), rtol=1e-4, atol=1e-4
    )


def test_caes_final_norm_comes_behind_the_blocks(context):
    regressor = build(final_norm=True)
    norm = regressor.norm
    wanted = F.layer_norm(by_hand(regressor, context, VISIBLE, MASKED), (WIDTH,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(regressor(context, VISIBLE, MASKED), wanted, rtol=1e-4, atol=1e-4)


def test_visible_latents_are_never_changed(context):
    regressor = build(depth=3)
    given = []
    for block in regressor.blocks:
        block.register_forward_hook(lambda module, inputs, output: given.append(inputs[1].clone()))
    before = context.clone()
    regressor(context, VISIBLE, MASKED)
    assert torch.equal(context, before)
    assert len(given) == 3
    assert all(torch.equal(seen, before) for seen in given)


def test_the_order_of_visible_patches_does_not_matter(context):
    regressor = build()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        regressor(context[:, order], VISIBLE[:, order], MASKED),
        regressor(context, VISIBLE, MASKED),
        rtol=1e-4,
        atol=1e-4,
    )


def test_positions_tell_masked_patches_apart(context):
    latents = build()(context, VISIBLE, MASKED)
    assert latents.shape == (2, 3, WIDTH)
    assert torch.cdist(latents, latents)[:, [0, 0, 1], [1, 2, 2]].min() > 1e-3


def test_drop_path_has_two_columns_a_block(context):
    regressor = build(drop=0.5)  # rates 0, 0.5
    assert regressor.drop_columns == 4
    kept = torch.full((2, 4), 0.99)
    whole = regressor(context, VISIBLE, MASKED, kept)
    kept[:, :2] = 0  # the first block is never dropped
    assert torch.equal(regressor(context, VISIBLE, MASKED, kept), whole)
    kept[0, 2] = 0
    changed = regressor(context, VISIBLE, MASKED, kept)
    assert not torch.allclose(changed[0], whole[0])
    torch.testing.assert_close(changed[1], whole[1])


def test_a_single_block_is_never_dropped(context):
    regressor = build(depth=1, drop=0.5)
    torch.testing.assert_close(
        regressor(context, VISIBLE, MASKED, torch.zeros(2, 2)), regressor(context, VISIBLE, MASKED)
    )


def test_initial_weights():
    torch.manual_seed(0)
    regressor = Regressor(width=96, depth=2, heads=12, grid=14)
    assert regressor.mask_token.abs().max() <= 0.02
    assert regressor.mask_token.any()
    block = regressor.blocks[0]
    assert torch.equal(block.ls1.gamma, torch.full((96,), 0.1))
    bound = (6 / 192) ** 0.5
    assert bound * 0.99 < block.attn.q.weight.abs().max() <= bound
    assert not block.mlp.fc1.bias.any()
    assert "pos_embed" in regressor.state_dict()


def test_a_narrow_context_does_not_narrow_the_stream(context):
    # Under autocast a Linear before the regressor returns bf16, which the following norm does not convert back (CPU).
    with torch.autocast("cpu", torch.bfloat16):
        latents = build()(context.bfloat16(), VISIBLE, MASKED)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()
