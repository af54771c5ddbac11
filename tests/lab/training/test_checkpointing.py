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
    choices,
    smallest_checkpointed,
)


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", models.available())
def test_the_gradient_is_backpropagations(name: str) -> None:
    net = models.build(name, num_classes=5, width=0.125)
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), trained(net))
    for choice in choices(net):
        again = checkpointed(net, *choice)
        assert any(isinstance(m, CheckpointedSequential) for m in again.modules())
        found = torch.autograd.grad(F.cross_entropy(again(x), y), trained(again))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_segments_of_a_chain() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    assert choices(net) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    assert [checkpointed(net, size).cuts for size in (1, 2)] == [(0, 2, 5, 7), (0, 5, 7)]
    assert [checkpointed(net, 1, n).cuts for n in (1, 2)] == [(0, 2), (0, 2, 5)]
    assert checkpointed(net, 1).state_dict().keys() == net.state_dict().keys()


def peak(net: nn.Module, x: torch.Tensor) -> int:
    optimizer, y = torch.optim.SGD(net.parameters(), 0.1), torch.zeros(len(x), dtype=torch.int64)
    return step_memory(lambda: F.cross_entropy(net(x), y).backward(), [net], optimizer, [x, y]).peak


def wide_first() -> nn.Sequential:
    """Where all maps but the first two are small: to compute the later ones twice saves nothing."""
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(8)]
    convolutions += [nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(10))), (4096, 8)),
        (wide_first(), (64, 3, 8, 8)),
    ],
    ids=["even", "wide-first"],
)
def test_the_segments_that_hold_least_are_taken(net: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    peaks = {choice: peak(checkpointed(net, *choice), x) for choice in choices(net)}
    taken = smallest_checkpointed(net, shape)
    assert peak(taken, x) <= 1.02 * min(peaks.values())
    again = taken.cuts[-1]  # so many modules run twice
    for choice, size in peaks.items():
        if size <= min(peaks.values()):
            assert again <= checkpointed(net, *choice).cuts[-1]


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
