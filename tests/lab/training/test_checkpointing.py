from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdalign.lab import models
from svdalign.lab.costs import step_memory
from svdalign.lab.training.checkpointing import (
    CheckpointedSequential,
    checkpointed,
    segment_sizes,
    smallest_checkpointed,
)


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", models.available())
def test_the_gradient_is_backpropagations(name: str) -> None:
    net = models.build(name, num_classes=5, width=0.125)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), trained(net))
    for size in segment_sizes(net):
        again = checkpointed(net, size)
        assert any(isinstance(m, CheckpointedSequential) for m in again.modules())
        found = torch.autograd.grad(F.cross_entropy(again(x), y), trained(again))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_segments_of_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    assert segment_sizes(net) == (1, 2)
    assert [checkpointed(net, size).cuts for size in (1, 2)] == [(0, 2, 5, 7), (0, 5, 7)]
    assert checkpointed(net, 1).state_dict().keys() == net.state_dict().keys()


def test_the_segmentation_that_holds_less_is_taken() -> None:
    """Nine narrow layers of one width: segments of three save least inputs and recompute little;
    with one wide layer after another, one block at a time does."""
    even = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(10)))
    net = smallest_checkpointed(even, (4096, 8))
    assert net.cuts in {checkpointed(even, size).cuts for size in segment_sizes(even)}
    x, y = torch.randn(4096, 8), torch.zeros(4096, dtype=torch.int64)

    def peak(model: nn.Module) -> int:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return step_memory(
            lambda: F.cross_entropy(model(x), y).backward(), [model], optimizer, [x, y]
        ).peak

    assert peak(net) == min(peak(checkpointed(even, size)) for size in segment_sizes(even))


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
