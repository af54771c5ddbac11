"""What ``factorize`` keeps of a trained network: all at full rank, else what the rank allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdalign as sva
from svdalign.lab import data, models

Trained = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A dense network after two epochs of backpropagation, and test images with their classes."""
    fashion = data.load("embedded", train_limit=2000, test_limit=500)
    x, y = fashion.train.images.float() / 255, fashion.train.labels
    torch.manual_seed(0)
    net = models.build("smallconv", num_classes=10, in_channels=1, image_size=28, width=0.5)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval(), fashion.test.images.float() / 255, fashion.test.labels


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def factored(net: nn.Module, rank: float, scheme: str) -> nn.Module:
    """All but the first convolution, which has one channel to read and no rank to spare."""
    convolutions = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    return sva.factorize(net, dict.fromkeys(convolutions[1:], rank), scheme)


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize(("rank", "lost"), [(1.0, 0.0), (0.9, 0.02), (0.75, 0.05), (0.5, 0.15)])
def test_accuracy_kept(trained: Trained, scheme: str, rank: float, lost: float) -> None:
    net, x, y = trained
    before = accuracy(net, x, y)
    assert before > 0.75
    assert accuracy(factored(net, rank, scheme), x, y) >= before - lost - 1e-9


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
def test_full_rank_is_the_same_function(trained: Trained, scheme: str) -> None:
    net, x, _ = trained
    with torch.no_grad():
        torch.testing.assert_close(
            factored(net, 1.0, scheme)(x[:64]), net(x[:64]), rtol=1e-4, atol=1e-4
        )
