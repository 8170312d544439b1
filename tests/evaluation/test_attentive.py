"""The attentive probe, held against CAE's released code, with the call that it cannot make corrected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cae2pipe.config.base import fingerprinted
from cae2pipe.config.evaluate import AttentiveSettings
from cae2pipe.evaluation.attentive import AttentiveProbe, head_count
from cae2pipe.evaluation.encoders import load_encoder

DIM, HEADS, CLASSES = 24, 12, 5


class Reference(nn.Module):
    """A query of zeros over normalised tokens without positions, no residual, torch's BatchNorm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(DIM, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(DIM)), nn.Parameter(torch.zeros(DIM))
        self.proj = nn.Linear(DIM, DIM)
        self.fc_norm = nn.BatchNorm1d(DIM, affine=False)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query_token.expand(len(x), -1, -1)
        q = F.linear(self.norm_q(query), self.q.weight, self.q_bias)
        k, v = self.k(self.norm_k(x)), F.linear(self.norm_v(x), self.v.weight, self.v_bias)
        q, k, v = (t.reshape(len(x), -1, HEADS, DIM // HEADS).transpose(1, 2) for t in (q, k, v))
        attention = (q * (DIM // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        pooled = self.proj((attention @ v).transpose(1, 2).reshape(len(x), 1, DIM))
        return self.head(self.fc_norm(pooled[:, 0]))


def copied(probe: AttentiveProbe) -> Reference:
    own, reference = probe.state_dict(), Reference()
    names = {"query": "query_token", "norm.running_mean": "fc_norm.running_mean"}
    names["norm.running_var"] = "fc_norm.running_var"
    reference.load_state_dict({names.get(name, name.removeprefix("attention.")): own[name] for name in own})
    return reference


def test_eight_steps_are_those_of_the_released_code():
    """The first pooled tokens have a variance of about 1e-5, so BatchNorm's epsilon matters."""
    torch.manual_seed(0)
    probe = AttentiveProbe(DIM, CLASSES, HEADS)
    reference = copied(probe)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9, nesterov=True) for model in (probe, reference)
    ]
    for _ in range(8):
        tokens, labels = torch.randn(16, 9, DIM), torch.randint(0, CLASSES, (16,))
        found, wanted = probe.train()(tokens), reference.train()(tokens)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for logits, optimizer in zip((found, wanted), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        probe.norm.update_running_stats()
    assert reference.query_token.abs().max() > 1e-3
    torch.testing.assert_close(probe.query, reference.query_token, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(probe.eval()(tokens), reference.eval()(tokens), rtol=1e-3, atol=1e-4)


def test_initial_weights_are_the_released_codes():
    torch.manual_seed(0)
    probe = AttentiveProbe(192, 1000, 12)
    assert not probe.query.any()
    for linear in (probe.attention.q, probe.attention.k, probe.attention.v, probe.attention.proj):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for bias in (probe.attention.q_bias, probe.attention.v_bias, probe.attention.proj.bias, probe.head.bias):
        assert not bias.any()
    assert float(probe.head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert probe.norm.eps == 1e-5


@pytest.mark.parametrize(("spec", "heads"), [("random:tiny", 12), ("random:vit_tiny_patch16_224", 3)])
def test_heads_are_the_students(spec, heads):
    encoder = load_encoder(spec, 0, torch.device("cpu"))
    assert head_count(192, encoder.heads) == encoder.heads == heads


def test_earlier_scores_keep_their_fingerprint():
    assert "eps" in fingerprinted(AttentiveSettings())
    assert "eps" not in fingerprinted(AttentiveSettings(eps=1e-6))
