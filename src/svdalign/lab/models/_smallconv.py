"""A small convolutional network."""

from __future__ import annotations

import itertools

from torch import nn

from ._layers import conv_bn, he_init, scaled


def smallconv(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Three 3x3 convolutions (32, 64, 128 channels), each halving the map, and a linear layer."""
    channels = [in_channels, *(scaled(c, width) for c in (32, 64, 128))]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(channels):
        layers += [*conv_bn(fan_in, fan_out, 3), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels[-1] * (image_size // 8) ** 2, num_classes)
    )
    he_init(net)
    return net
