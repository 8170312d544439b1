from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import RelPosBias

from cae2pipe.models.relative_positions import relative_bias


@pytest.fixture
def positions() -> RelPosBias:
    torch.manual_seed(0)
    made = RelPosBias((3, 5), 4, 1)
    torch.nn.init.normal_(made.relative_position_bias_table)
    return made


def bias_of(positions: RelPosBias) -> torch.Tensor:
    return relative_bias(
        positions.relative_position_bias_table, positions.relative_position_index, positions.bias_shape[0]
    )


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
    torch.library.opcheck(relative_bias, (table, index, 16))


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
