"""Feedback alignment and sign symmetry on layers of every kind: done, or said to be left out."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import svdalign as sva
from svdalign import rules

RULES = [name for name in rules.available() if rules.get(name).needs_affine_layers]
LABELS = torch.arange(6) % 3


def gradients(net: nn.Module, rule: str, x: Tensor) -> dict[str, Tensor]:
    learner = sva.Learner(net, rule, optimizer=lambda p: torch.optim.SGD(p, 0.1), example=x)
    return learner.gradients(x, LABELS)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm((5, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head(self.norm(h + self.attention(h, h, h)[0]).mean(1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("net", "x", "named"),
    [
        (Recurrent, torch.randn(6, 5, 4), r"in 'rnn' \(LSTM\): it has"),
        (Attending, torch.arange(30).reshape(6, 5) % 9, r"in 'attention' \(MultiheadAttention\): "),
    ],
)
def test_layers_without_feedback_weights_are_named(rule: str, net, x: Tensor, named: str) -> None:
    with pytest.warns(UserWarning, match=rf"rule '{rule}' sends errors back as back.*{named}"):
        found = gradients(net(), rule, x)
    assert found["head.weight"].abs().max() > 0


def _old_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(layer)


COMPUTED = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": _old_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_have_feedback_weights_too(rule: str, compute) -> None:
    """Of the last layer the gradient is that of backpropagation; what comes before it differs."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    compute(net[2])
    x = torch.randn(6, 8)
    before = copy.deepcopy(net.state_dict())
    weight = net[2].weight.detach().clone()
    found, exact = gradients(net, rule, x), gradients(net, "bp", x)
    for name in exact:
        if name.startswith("2."):
            torch.testing.assert_close(found[name], exact[name])
    assert not torch.allclose(found["0.weight"], exact["0.weight"])
    assert torch.equal(net[2].weight, weight)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
def test_a_subclass_sends_errors_back_as_it_sends_signals(rule: str) -> None:
    """Here through a padding of its own."""

    class Padded(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (2, 0)))

    net = nn.Sequential(Padded(1, 4, 3), nn.Tanh(), Padded(4, 3, 3), nn.AdaptiveAvgPool1d(1))
    net.append(nn.Flatten())
    x = torch.randn(6, 1, 9)
    found, exact = gradients(net, rule, x), gradients(net, "bp", x)
    torch.testing.assert_close(found["2.weight"], exact["2.weight"])
    assert not torch.allclose(found["0.weight"], exact["0.weight"])


def test_a_layer_of_one_number_has_feedback() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 3))
    assert all(g.isfinite().all() for g in gradients(net, "fa", torch.randn(6, 4)).values())
