from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdalign.lab import models
from svdalign.lab.costs import step_memory
from svdalign.lab.experiments.checkpointing import Segment, checkpointed, segment_sizes


@pytest.mark.parametrize("name", models.available())
def test_the_gradient_is_backpropagations(name: str) -> None:
    net = models.build(name, num_classes=5, width=0.125)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    for size in segment_sizes(net):
        again = checkpointed(net, size)
        assert any(isinstance(m, Segment) for m in again.modules())
        found = torch.autograd.grad(F.cross_entropy(again(x), y), list(again.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_segments_of_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    assert segment_sizes(net) == (1, 2)
    lengths = [[len(m) for m in checkpointed(net, s) if isinstance(m, Segment)] for s in (1, 2)]
    assert lengths == [[2, 3, 2], [5, 2]]


def test_it_holds_less() -> None:
    net = models.build("resnet20", num_classes=5, width=0.5)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 5

    def activations(net: nn.Module) -> int:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        step()
        return step_memory(step, [net], optimizer, [x, y]).activations

    assert activations(checkpointed(net, 1)) < 0.5 * activations(net)
