from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from timm.layers.pos_embed_rel import gen_relative_position_index

from cae2pipe.models.relative_positions import (
    chosen_pairs,
    relative_bias,
    relative_index,
    resized_table,
    score_bias,
    table_rows,
)


@pytest.fixture
def positions() -> RelPosBias:
    torch.manual_seed(0)
    made = RelPosBias((3, 5), 4, 1)
    torch.nn.init.normal_(made.relative_position_bias_table)
    return made


def bias_of(positions: RelPosBias) -> torch.Tensor:
    return relative_bias(positions.relative_position_bias_table, positions.relative_position_index.view(16, 16))


def test_bias_and_gradient_are_those_of_timm(positions):
    weights = torch.randn(1, 4, 16, 16)
    table = positions.relative_position_bias_table
    found = []
    for bias in (bias_of(positions), positions.get_bias()):
        (gradient,) = torch.autograd.grad((bias * weights).sum(), table)
        found.append((bias, gradient))
    assert torch.equal(found[0][0], found[1][0].squeeze(0))
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at what is no leaf
def test_the_operator_is_registered_as_it_behaves(positions):
    table, index = positions.relative_position_bias_table, positions.relative_position_index
    torch.library.opcheck(relative_bias, (table, index.view(16, 16)))
    torch.library.opcheck(relative_bias, (table, index.view(16, 16)[:6].view(2, 3, 16)))


def test_compiled_attention_takes_a_contiguous_bias_in_both_passes(positions):
    """In forward and backward graphs the bias is the operator's output, not a copy with another layout."""
    q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()

    def attend():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(positions)).square().sum()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    parameter = positions.relative_position_bias_table
    wanted = torch.autograd.grad(attend(), parameter)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(), parameter)[0], wanted)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("relative_bias" in target for target in called)
    bias = bias_of(positions)
    # With four dimensions, inductor would use channels-last if convolutions follow.
    assert bias.is_contiguous()
    assert bias.ndim == 3


@pytest.mark.parametrize("class_token", [True, False])
def test_the_index_is_timms(class_token):
    wanted = gen_relative_position_index((4, 4), class_token=class_token)
    assert torch.equal(relative_index(4, 4, reach=4, class_token=class_token), wanted)
    assert table_rows(4, class_token=class_token) == wanted.max() + 1


def test_a_smaller_grid_has_the_offsets_of_a_larger_ones_table():
    """A grid of 2 x 3 within one of 5 x 5: the same pairs have the same rows."""
    tokens = torch.tensor([0, *(1 + 5 * row + col for row in range(2) for col in range(3))])
    whole = relative_index(5, 5, reach=5, class_token=True)
    assert torch.equal(relative_index(2, 3, reach=5, class_token=True), whole[tokens][:, tokens])


def test_biases_of_chosen_tokens_and_their_gradients_are_those_of_all_pairs():
    torch.manual_seed(0)
    table = torch.randn(table_rows(3, class_token=False), 2, requires_grad=True)
    index = relative_index(3, 3, reach=3, class_token=False)
    queries, keys = torch.tensor([[0, 4], [8, 2]]), torch.tensor([[1, 2, 3], [0, 5, 7]])
    chosen = score_bias(table, chosen_pairs(index, queries, keys))
    whole = table[index].permute(2, 0, 1)
    wanted = torch.stack([whole[:, q][:, :, k] for q, k in zip(queries, keys, strict=True)])
    assert torch.equal(chosen, wanted)
    weights = torch.randn_like(wanted)
    found, true = (torch.autograd.grad((bias * weights).sum(), table)[0] for bias in (chosen, wanted))
    torch.testing.assert_close(found, true)


def test_a_table_of_another_grid_keeps_the_biases_of_near_patches():
    """A table whose biases are its offsets: they are kept at the own grid, and cropped to a smaller one. At a larger
    one neighbours keep theirs, and the farthest patches have those of the farthest before."""
    down, right = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-6.0, 7), indexing="ij")
    table = torch.cat([torch.stack([down, right], dim=2).flatten(0, 1), torch.tensor([[7.0, 8], [9, 10], [11, 12]])])
    torch.testing.assert_close(resized_table(table, 7, 7), table)
    smaller = resized_table(table, 3, 4)
    assert smaller[:-3].view(5, 7, 2)[:, 0, 0].tolist() == pytest.approx([-2, -1, 0, 1, 2])
    assert smaller[:-3].view(5, 7, 2)[0, :, 1].tolist() == pytest.approx([-3, -2, -1, 0, 1, 2, 3])
    larger = resized_table(table, 16, 7)
    along = larger[:-3].view(31, 13, 2)[:, 0, 0]
    assert along[14:17].tolist() == pytest.approx([-1, 0, 1])
    assert along[[0, -1]].tolist() == pytest.approx([-6, 6])
    assert (along.diff() > 0).all()
    assert torch.equal(larger[-3:], table[-3:])
