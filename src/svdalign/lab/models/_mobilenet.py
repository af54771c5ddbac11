"""MobileNetV1 of Howard et al. 2017."""

from __future__ import annotations

from torch import nn

from ._layers import conv_bn, he_init, scaled

# Output channels and stride of each depthwise-separable block.
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class Separable(nn.Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        depthwise = conv_bn(in_channels, in_channels, 3, stride, groups=in_channels)
        pointwise = conv_bn(in_channels, out_channels, 1)
        super().__init__(*depthwise, nn.ReLU(), *pointwise, nn.ReLU())


def mobilenet_v1(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """A 3x3 stem, thirteen depthwise-separable blocks, a linear classifier.

    The stem halves the map, as published, from 64 pixels on; smaller images (CIFAR) would leave the
    later blocks no map. The pointwise convolutions hold nearly all weights of the blocks.
    """
    channels = scaled(32, width)
    stem = conv_bn(in_channels, channels, 3, stride=2 if image_size >= 64 else 1)
    net = nn.Sequential(nn.Sequential(*stem, nn.ReLU()))
    for base, stride in _BLOCKS:
        out_channels = scaled(base, width)
        net.append(Separable(channels, out_channels, stride))
        channels = out_channels
    net.extend((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)))
    he_init(net)
    return net
