"""Muon against its definition, worked out by SVD in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.oracles import stiefel as oracle
from torch import Tensor, nn

import svdalign as sva
from svdalign.factors import FactoredLayer, _cut, factorize, reduce_rank
from svdalign.factors.muon import hidden_weights
from svdalign.factors.rediagonalize import rediagonalize


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(), nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 4),
    ).double()  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(4, (6,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for seed in steps:
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def hidden(model: nn.Module) -> set[str]:
    found = [p for p, _ in hidden_weights(model)]
    return {name for name, p in model.named_parameters() if any(p is q for q in found)}


def test_hidden_are_what_could_be_factored_but_for_the_classifier() -> None:
    net = network()
    assert hidden(net) == {"0.weight", "5.weight"}
    model = factorize(net, {"5": 4})
    assert hidden(model) == {"0.weight", "5.U", "5.V"}
    model = factorize(net, {"0": 2, "7": 2})
    assert hidden(model) == {"0.U", "0.V", "5.weight", "7.U", "7.V"}


@pytest.mark.parametrize("rank", [None, {"0": 5, "5": 4}], ids=["dense", "factored"])
def test_steps_are_those_of_the_definition(rank: dict[str, int] | None) -> None:
    model = network() if rank is None else factorize(network(), rank)
    lr, momentum, rate = 0.07, 0.8, 0.003
    optimizer = sva.Muon(model.parameters(), model, lr, momentum=momentum, adam_lr=rate)
    twin = copy.deepcopy(model)
    names = hidden(model)
    others = [p for name, p in twin.named_parameters() if name not in names]
    adamw = torch.optim.AdamW(others, rate, weight_decay=0.0)
    expected = {name: twin.get_parameter(name).detach().numpy().copy() for name in names}
    moments = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        twin.zero_grad()
        x, y = batch(step)
        F.cross_entropy(twin(x), y).backward()
        adamw.step()
        for name in names:
            p = twin.get_parameter(name)
            assert p.grad is not None
            gradient, X = p.grad.numpy(), expected[name]
            moments[name] = momentum * moments[name] + gradient
            ahead = (gradient + momentum * moments[name]).reshape(len(X), -1)
            turn = oracle.nearly_polar(ahead).reshape(X.shape)
            if name[-1] in "UV":
                X = X - lr * turn
            else:
                norm = np.linalg.norm(X)
                X = X - lr * norm / np.sqrt(min(ahead.shape)) * turn
                X = X * norm / np.linalg.norm(X)
            expected[name] = X
            p.data.copy_(torch.from_numpy(expected[name]))
        train(model, optimizer, range(step, step + 1))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=0, atol=1e-9)


def test_a_step_turns_every_direction_of_a_factor_by_about_lr() -> None:
    model = factorize(network(), {"5": 8})
    layer = model[5]
    assert isinstance(layer, FactoredLayer)
    learner = sva.Learner(
        model, "bp", optimizer=lambda p: sva.Muon(p, model, 0.05), example=batch(0)[0]
    )
    before = layer.V.detach().clone()
    learner.step(*batch(1))
    angles = torch.linalg.svdvals(before.mT @ layer.V).clamp(max=1).arccos()
    assert (angles < 1.21 * 0.05 + 1e-3).all()
    assert angles.max() > 0.5 * 0.05


def test_autocast_around_it_changes_nothing() -> None:
    a = factorize(network(), 0.5).float()
    b = copy.deepcopy(a)
    for model in (a, b):
        x, y = batch(0)
        F.cross_entropy(model(x.float()), y).backward()
    sva.Muon(a.parameters(), a).step()
    with torch.autocast("cpu", torch.bfloat16):
        sva.Muon(b.parameters(), b).step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def orthonormal_and_trained() -> tuple[nn.Module, sva.Muon]:
    """A model whose factors are orthonormal, and an optimizer with state."""
    model = factorize(network(), {"5": 6})
    optimizer = sva.Muon(model.parameters(), model)
    train(model, optimizer, range(3))
    layer = model[5]
    U, V = (torch.linalg.qr(X.detach()).Q for X in (layer.U, layer.V))
    layer.set_factors(U, layer.s, V)
    return model, optimizer


def twin_of(model: nn.Module, optimizer: sva.Muon) -> tuple[nn.Module, sva.Muon]:
    twin = copy.deepcopy(model)
    other = sva.Muon(twin.parameters(), twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, other


def test_rediagonalising_at_full_rank_changes_no_step() -> None:
    model, optimizer = orthonormal_and_trained()
    model[5].s.data[::2] *= -1
    twin, other = twin_of(model, optimizer)
    layer = twin[5]
    turned = rediagonalize(layer.U, layer.s, layer.V)
    _cut.cut_layer(layer, turned, torch.arange(6), (other,))
    for step in range(5, 8):
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
        torch.testing.assert_close(twin[5].matrix(), model[5].matrix())


def test_dropping_null_columns_changes_no_other_step() -> None:
    model = factorize(network(), {"5": 6})
    layer = model[5]
    optimizer = sva.Muon(model.parameters(), model)
    layer.s.data[[1, 4]] = 0.0
    layer.s.register_hook(lambda g: g * (layer.s.detach() != 0))  # else they would grow again
    train(model, optimizer, range(3))
    U, V = (torch.linalg.qr(X.detach()).Q for X in (layer.U, layer.V))
    layer.U.data.copy_(U)
    layer.V.data.copy_(V)
    twin, other = twin_of(model, optimizer)
    cuts = reduce_rank(twin, other, energy=1.0)
    assert [cut.after for cut in cuts] == [4]
    train(model, optimizer, range(9, 10))
    train(twin, other, range(9, 10))
    torch.testing.assert_close(twin[5].U, layer.U[:, [0, 2, 3, 5]])
    torch.testing.assert_close(twin[5].s, layer.s[[0, 2, 3, 5]])
    torch.testing.assert_close(twin[5].V, layer.V[:, [0, 2, 3, 5]])


def test_a_closure_is_called_and_parameters_without_gradients_are_left() -> None:
    model = factorize(network(), {"5": 6})
    optimizer = sva.Muon(model.parameters(), model)
    before = copy.deepcopy(model.state_dict())
    assert optimizer.step() is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def closure() -> Tensor:
        loss = model[7].weight.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss == before["7.weight"].square().sum()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"7.weight"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0, got -1"),
        ({"adam_lr": float("nan")}, ValueError, "adam_lr must be at least 0, got nan"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"params": [{"params": []}]}, TypeError, "params must be tensors, without groups"),
    ],
)
def test_what_cannot_be_is_named(given, error, message) -> None:
    net = network()
    with pytest.raises(error, match=message):
        sva.Muon(**{"params": net.parameters(), "model": net, **given})
