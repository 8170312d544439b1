import pytest
import torch

from cae2pipe.models.encoder import Encoder
from cae2pipe.models.positions import sincos_positions

WIDTH, PATCH, SIZE = 24, 8, 32


def build(seed: int = 0, **over) -> Encoder:
    torch.manual_seed(seed)
    shape = {"width": WIDTH, "depth": 3, "heads": 3, "image_size": SIZE, "patch_size": PATCH, "layer_scale": 1.0}
    return Encoder(**(shape | over))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


VISIBLE = torch.tensor([[0, 3, 7, 12], [1, 2, 5, 15]])


def test_shapes(pixels):
    encoder = build()
    assert encoder(pixels).shape == (2, 17, WIDTH)
    assert encoder(pixels, VISIBLE).shape == (2, 5, WIDTH)
    assert encoder.drop_columns == 6


def test_all_patches_visible_is_no_mask(pixels):
    encoder = build()
    torch.testing.assert_close(encoder(pixels, torch.arange(16).expand(2, -1)), encoder(pixels))


def test_visible_patches_come_in_the_order_given(pixels):
    encoder = build()
    straight, turned = encoder(pixels, VISIBLE), encoder(pixels, VISIBLE.flip(1))
    torch.testing.assert_close(turned[:, 1:], straight[:, 1:].flip(1))
    torch.testing.assert_close(turned[:, 0], straight[:, 0])


def test_masked_patches_do_not_reach_the_output(pixels):
    encoder = build()
    before = encoder(pixels, VISIBLE)
    changed = pixels.clone()
    for sample, indices in enumerate(VISIBLE.tolist()):
        for patch in set(range(16)) - set(indices):
            top, left = patch // 4 * PATCH, patch % 4 * PATCH
            changed[sample, :, top : top + PATCH, left : left + PATCH] = 1e3
    assert not torch.equal(changed, pixels)
    assert torch.equal(encoder(changed, VISIBLE), before)
    # A visible patch does.
    changed[0, :, :PATCH, :PATCH] += 1
    after = encoder(changed, VISIBLE)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_positions_are_kept_but_not_trained():
    encoder = build()
    assert "pos_embed" in encoder.state_dict()
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert torch.equal(encoder.pos_embed[0, 0], torch.zeros(WIDTH))
    assert torch.equal(encoder.pos_embed[0, 1:], sincos_positions(4, 4, WIDTH))


def test_the_class_token_ends_normalised_with_the_rest(pixels):
    output = build()(pixels, VISIBLE)
    torch.testing.assert_close(output.mean(dim=-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.var(dim=-1, unbiased=False), torch.ones(2, 5), rtol=0, atol=1e-3)


def test_initial_weights():
    encoder = build(width=192, heads=12, layer_scale=0.1)
    for name, parameter in encoder.state_dict().items():
        if name == "pos_embed":
            continue
        if name.endswith(".gamma"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.1))
        elif "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif name in ("cls_token", "patch_embed.weight"):
            assert parameter.abs().max() <= 0.02
            assert parameter.std() == pytest.approx(0.0108, rel=0.15)
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert bound * 0.99 < parameter.abs().max() <= bound, name
            assert parameter.std() == pytest.approx(bound / 3**0.5, rel=0.02), name


def test_every_norm_has_the_released_epsilon():
    norms = [module for module in build().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 7
    assert {norm.eps for norm in norms} == {1e-6}


def test_drop_path_is_a_function_of_its_uniforms(pixels):
    encoder = build(drop=0.5)
    uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder(pixels, VISIBLE, uniforms), encoder(pixels, VISIBLE, uniforms))
    assert not torch.allclose(encoder(pixels, VISIBLE, uniforms), encoder(pixels, VISIBLE))


def test_a_dropped_block_is_skipped_for_its_sample_alone(pixels):
    encoder = build(drop=0.5)  # rates 0, 0.25, 0.5
    kept = torch.full((2, 6), 0.99)
    whole = encoder(pixels, VISIBLE, kept)
    dropped = kept.clone()
    dropped[0, 4:] = 0
    result = encoder(pixels, VISIBLE, dropped)
    torch.testing.assert_close(result[1], whole[1])
    encoder.blocks, encoder.drop_rates = encoder.blocks[:2], encoder.drop_rates[:4]
    torch.testing.assert_close(result[0], encoder(pixels, VISIBLE, kept[:, :4])[0])


def test_each_residual_branch_has_its_own_column(pixels):
    encoder = build(drop=0.5)
    whole = encoder(pixels, VISIBLE, torch.full((2, 6), 0.99))
    results = [whole]
    for column in range(6):
        uniforms = torch.full((2, 6), 0.99)
        uniforms[:, column] = 0
        results.append(encoder(pixels, VISIBLE, uniforms))
    # The first block's rate is 0: nothing drops it.
    assert torch.equal(results[1], whole)
    assert torch.equal(results[2], whole)
    for number, result in enumerate(results[3:]):
        assert all(not torch.allclose(result, other) for other in results[:1] + results[3 : 3 + number])


def test_bf16_autocast_stays_near_fp32(pixels):
    encoder = build()
    exact = encoder(pixels, VISIBLE)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(pixels, VISIBLE)
    assert rough.dtype == torch.float32  # the residual stream and its norms are never narrowed
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1)
    assert not torch.equal(rough, exact)


def offsets_by_hand(table: torch.Tensor, query: int, key: int) -> torch.Tensor:
    """The biases (heads,) of a pair of tokens on the 4 x 4 grid, of which 0 is the class token (BEiT)."""
    if query == 0 or key == 0:
        return table[49 + (2 if query == key else 0 if query == 0 else 1)]
    (row, col), (other_row, other_col) = divmod(query - 1, 4), divmod(key - 1, 4)
    return table[(row - other_row + 3) * 7 + col - other_col + 3]


def turned_by_hand(x, tokens):
    """Features in pairs as complex numbers, turned by the row of a token's patch, the last of them by its column."""
    pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())
    count = pairs.shape[1] // 2
    result = []
    for number, token in enumerate(tokens):
        row, col = divmod(token - 1, 4) if token else (0, 0)
        angles = [place * 10000 ** (-band / count) for place in (row, col) for band in range(count)]
        result.append(pairs[number] * torch.exp(1j * torch.tensor(angles)))
    return torch.view_as_real(torch.stack(result)).flatten(1)


def check_attention(encoder, pixels, scores_of) -> None:
    """The only block gives what its attention does with scores by hand: of a head's q, k, its number and the tokens."""
    (block,), given = encoder.blocks, []
    block.register_forward_hook(lambda module, inputs, output: given.append((inputs[0], output)))
    encoder(pixels, VISIBLE)
    (before, after), size = given[0], WIDTH // 3
    for sample, tokens in enumerate([[0, *(p + 1 for p in row)] for row in VISIBLE.tolist()]):
        x = before[sample]
        q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv_bias()).chunk(3, dim=-1)
        heads = []
        for head in range(3):
            part = slice(head * size, (head + 1) * size)
            heads.append(scores_of(q[:, part], k[:, part], head, tokens).softmax(dim=-1) @ v[:, part])
        x = x + block.ls1(block.attn.proj(torch.cat(heads, dim=1)))
        torch.testing.assert_close(after[sample], x + block.ls2(block.mlp(block.norm2(x))), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_relative_positions_bias_the_scores_of_visible_tokens(pixels):
    encoder = build(depth=1, relative_positions=True)
    plain = build(depth=1)
    torch.testing.assert_close(encoder(pixels, VISIBLE), plain(pixels, VISIBLE))
    table = torch.nn.init.normal_(encoder.blocks[0].attn.relative_position_bias_table)

    def scores(q, k, head, tokens):
        bias = torch.stack([torch.stack([offsets_by_hand(table, a, b)[head] for b in tokens]) for a in tokens])
        return q @ k.T / q.shape[1] ** 0.5 + bias

    check_attention(encoder, pixels, scores)


@torch.no_grad()
def test_rotary_positions_turn_queries_and_keys_of_visible_patches(pixels):
    def scores(q, k, head, tokens):
        return turned_by_hand(q, tokens) @ turned_by_hand(k, tokens).T / q.shape[1] ** 0.5

    check_attention(build(depth=1, rotary_positions=True), pixels, scores)


@pytest.mark.parametrize("more", ["relative_positions", "rotary_positions"])
@torch.no_grad()
def test_with_more_positions_all_patches_visible_is_no_mask(pixels, more):
    encoder = build(**{more: True})
    for block in encoder.blocks if more == "relative_positions" else ():
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.testing.assert_close(encoder(pixels, torch.arange(16).expand(2, -1)), encoder(pixels))
    turned, straight = encoder(pixels, VISIBLE.flip(1)), encoder(pixels, VISIBLE)
    torch.testing.assert_close(turned[:, 1:], straight[:, 1:].flip(1))
