"""Running a model without a trace: its buffers, its modes and the random state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import svdalign as sva
from svdalign.engine.forward import evaluating, preserved


def test_evaluating_puts_back_the_mode_of_every_module() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[1][0].eval()
    before = [module.training for module in net.modules()]
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert [module.training for module in net.modules()] == before


class Counting(nn.Module):
    """Buffers of every kind, each changed in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("written_by_data", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("lazy", None)
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.written_by_data.data.add_(1)
        self.replaced = self.replaced + 1
        if self.lazy is None:
            self.lazy = x.detach().mean(0)
        return self.norm(x) * self.expanded


def test_buffers_come_back_as_they_were() -> None:
    model = Counting()
    objects = {name: model._buffers[name] for name in model._buffers}
    values = {name: value.clone() for name, value in model.named_buffers()}
    with preserved(model):
        model(torch.randn(4, 3))
        assert not torch.equal(model.norm.running_mean, values["norm.running_mean"])
    assert all(model._buffers[name] is value for name, value in objects.items())
    assert model.lazy is None
    assert {name for name, _ in model.named_buffers()} == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.named_buffers())


def test_a_graph_that_was_there_before_can_be_used_after() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    wanted = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    z = model(x).sum()
    with preserved(model):
        model(x)
    assert torch.equal(torch.autograd.grad(z, model[0].weight)[0], wanted)


def test_what_fills_a_buffer_on_its_first_pass_does_so_in_the_first_step() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("centre", None)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).tanh()
            if self.centre is None:
                self.centre = h.detach().mean(0)
            return self.head(h - self.centre)

    model, x = Lazy(), torch.randn(5, 4)
    learner = sva.Learner(
        model, "dfa", units="layer", optimizer=lambda p: torch.optim.SGD(p, 0.1),
        example=torch.randn(2, 4),
    )  # fmt: skip
    assert model.centre is None
    wanted = model.layer(x).tanh().mean(0)
    learner.step(x, torch.arange(5) % 3)
    torch.testing.assert_close(model.centre, wanted)
