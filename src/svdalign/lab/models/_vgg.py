"""VGG-8 and VGG-13."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._layers import conv_bn, he_init, scaled

# Channels of the 3x3 convolutions; None is a 2x2 max pooling.
_VGG8B = (128, 256, None, 256, 512, None, 512, None, 512, None)
_VGG13 = (64, 64, None, 128, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)


def vgg8(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """VGG8B of Nøkland & Eidnes 2019: six convolutions and two linear layers."""
    return _vgg(_VGG8B, (1024,), num_classes, in_channels, image_size, width)


def vgg13(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Configuration B of Simonyan & Zisserman 2015 with batch norm, classifier 512 wide (CIFAR)."""
    return _vgg(_VGG13, (512, 512), num_classes, in_channels, image_size, width)


def _vgg(
    plan: Sequence[int | None],
    hidden: Sequence[int],
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: float,
) -> nn.Module:
    """Poolings are left out once the map is down to one pixel (VGG-13 below 32 pixels)."""
    layers: list[nn.Module] = []
    channels, size = in_channels, image_size
    for entry in plan:
        if entry is not None:
            out_channels = scaled(entry, width)
            layers += [*conv_bn(channels, out_channels, 3), nn.ReLU()]
            channels = out_channels
        elif size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    layers.append(nn.Flatten())
    features = channels * size**2
    for units in (scaled(h, width) for h in hidden):
        layers += [nn.Linear(features, units), nn.ReLU()]
        features = units
    net = nn.Sequential(*layers, nn.Linear(features, num_classes))
    he_init(net)
    return net
