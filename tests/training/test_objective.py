import pytest
import torch
import torch.nn.functional as F


def test_tf32_in_the_decoding_costs_a_cosine_of_a_millionth_at_most(targets):
    """TF32's rounding of the factors, by hand: 10 bits of mantissa are kept."""
    codec = targets.layout.codec
    block = targets.reader(sorted(targets.stores)[0]).block(0, ["symbols"])
    symbols = {"symbols": torch.from_numpy(block.arrays["symbols"].view("int16"))}
    exact = codec.decode(symbols)

    class Rounded(type(codec)):
        def _constants(self):
            mean, basis, token_basis, *others = super()._constants()
            return mean, rounded(basis), rounded(token_basis), *others

    again = Rounded(codec.mean, codec.basis, codec.token_basis, spread=codec.spread, step=codec.step).decode(symbols)
    assert not torch.equal(again, exact)
    assert F.cosine_similarity(again, exact, dim=-1).min() > 1 - 1e-6


def rounded(values: torch.Tensor) -> torch.Tensor:
    bits = values.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_raw_and_stored_latents_are_the_same_targets(make, targets, pretrain_settings, kind):
    step, batches = make(pretrain_settings(loss={"kind": kind}))
    target = step.objective.parts[0].target(batches[0].arrays)
    norms = batches[0].arrays["norms"].float().unsqueeze(-1) if kind == "mse" else 1
    assert torch.equal(target, targets.layout.codec.decode(batches[0].arrays) * norms)
    raw = 3 * target
    wanted = F.normalize(raw, dim=-1) if kind == "cosine" else raw
    assert torch.equal(step.objective.parts[0].target({"raw": raw}), wanted)


def test_bf16_keeps_the_loss_in_fp32_and_close(make, pretrain_settings):
    from cae2pipe.training.step import forward

    wide, batches = make(pretrain_settings(precision="fp32"))
    narrow, _ = make(pretrain_settings(precision="bf16"))
    batch = batches[0]
    one, two = (forward(step.objective, batch, batch.arrays) for step in (wide, narrow))
    assert two.dtype == torch.float32
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
    two[0].backward()
    assert {p.grad.dtype for p in narrow.parameters} == {torch.float32}
