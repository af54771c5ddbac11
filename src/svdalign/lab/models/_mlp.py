"""A multilayer perceptron."""

from __future__ import annotations

from torch import nn

from ._layers import scaled


def mlp(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Three linear layers, 512 units wide."""
    hidden = scaled(512, width)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size**2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
