import pytest
import torch

from cae2pipe.models.layers import (
    CrossAttention,
    Mlp,
    SelfAttention,
    attend,
    drop_factors,
    drop_path,
    drop_rates,
    gather_tokens,
    run_block,
)


def by_hand(q, k, v, heads):
    """Attention one head at a time, without torch's function."""
    size = q.shape[-1] // heads
    results = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        results.append(scores.softmax(dim=-1) @ v[..., part])
    return torch.cat(results, dim=-1)


def test_attend_is_softmax_attention_head_by_head():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    torch.testing.assert_close(attend(q, k, v, heads=3), by_hand(q, k, v, 3))


def test_self_attention_has_biases_on_q_and_v_only():
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    torch.nn.init.normal_(attention.q_bias)
    torch.nn.init.normal_(attention.v_bias)
    x = torch.randn(2, 4, 8)
    q, k, v = (x @ weight.T for weight in attention.qkv.weight.chunk(3))
    wanted = attention.proj(by_hand(q + attention.q_bias, k, v + attention.v_bias, 2))
    torch.testing.assert_close(attention(x), wanted)
    assert {name for name, _ in attention.named_parameters()} == {
        "q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"
    }  # fmt: skip


def test_cross_attention_narrows_where_heads_do_not_divide_the_width():
    torch.manual_seed(0)
    attention = CrossAttention(20, 3)
    torch.nn.init.normal_(attention.q_bias)
    torch.nn.init.normal_(attention.v_bias)
    assert attention.q.weight.shape == attention.k.weight.shape == attention.v.weight.shape == (18, 20)
    q, k, v = torch.randn(2, 3, 20), torch.randn(2, 6, 20), torch.randn(2, 6, 20)
    wanted = by_hand(
        q @ attention.q.weight.T + attention.q_bias, k @ attention.k.weight.T, v @ attention.v.weight.T
        + attention.v_bias, 3
    )  # fmt: skip
    torch.testing.assert_close(attention(q, k, v), attention.proj(wanted))


def test_mlp_has_an_exact_gelu():
    torch.manual_seed(0)
    mlp = Mlp(4)
    x = 3 * torch.randn(5, 4)
    hidden = mlp.fc1(x)
    assert hidden.shape == (5, 16)
    exact = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    torch.testing.assert_close(mlp(x), mlp.fc2(exact), rtol=0, atol=1e-6)


def test_drop_path_keeps_a_sample_whose_uniform_reaches_the_rate():
    x = torch.ones(3, 2, 4)
    factors = drop_factors(torch.tensor([[0.2499], [0.25], [0.9]]), torch.tensor([0.25]))
    result = drop_path(x, factors[:, 0])
    assert torch.equal(result[0], torch.zeros(2, 4))
    torch.testing.assert_close(result[1:], torch.full((2, 2, 4), 1 / 0.75))


def test_drop_path_keeps_the_mean():
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert drop_factors(uniforms.unsqueeze(1), torch.tensor([0.3])).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factor", [None, drop_factors(torch.zeros(2, 1), torch.zeros(1))[:, 0]])
def test_drop_path_without_uniforms_or_rate_changes_nothing(factor):
    x = torch.randn(2, 3, 4)
    assert torch.equal(drop_path(x, factor), x)


def test_a_block_computed_again_gives_the_same_gradients():
    torch.manual_seed(0)
    mlp = Mlp(4)
    gradients = []
    for again in (False, True):
        x = torch.ones(2, 4, requires_grad=True)
        run_block(mlp, again, x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in mlp.parameters())])
        mlp.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_drop_rates_rise_linearly_over_the_depth():
    assert drop_rates(0.1, 4).tolist() == pytest.approx([0, 0, 0.1 / 3, 0.1 / 3, 0.2 / 3, 0.2 / 3, 0.1, 0.1])
    assert drop_rates(0.1, 1).tolist() == [0, 0]
    assert drop_rates(0.1, 0).tolist() == []


def test_selected_tokens_and_their_gradients_are_the_gathered_ones():
    tokens = torch.randn(3, 7, 5, requires_grad=True)
    indices = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    wanted = tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, 5))
    found = gather_tokens(tokens, indices)
    assert torch.equal(found, wanted)
    ahead = torch.randn_like(found)
    (one,), (two,) = (torch.autograd.grad(out, tokens, ahead) for out in (found, wanted))
    assert torch.equal(one, two)
    assert gather_tokens(tokens, indices[:, :0]).shape == (3, 0, 5)
