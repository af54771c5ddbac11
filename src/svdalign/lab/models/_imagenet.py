"""ImageNet ResNets of He et al. 2016; those with bottlenecks have their stride in the 3x3
convolution, as commonly trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ._layers import conv_bn, he_init, scaled
from ._resnet import BasicBlock


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip, ``(N, in, H, W)`` to ``(N, 4 inner, H', W')``."""

    def __init__(self, in_channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * inner
        self.conv1, self.bn1 = conv_bn(in_channels, inner, 1)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(inner, inner, 3, stride)
        self.relu2 = nn.ReLU()
        self.conv3, self.bn3 = conv_bn(inner, out_channels, 1)
        same_shape = stride == 1 and in_channels == out_channels
        self.skip = nn.Identity() if same_shape else conv_bn(in_channels, out_channels, 1, stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.bn1(self.conv1(x)))
        h = self.relu2(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        h += self.skip(x)  # in place: what no backward pass reads is not kept
        out: Tensor = self.relu3(h)
        return out


def _resnet(
    block: Callable[[int, int, int], nn.Module],
    growth: int,
    depths: tuple[int, ...],
    num_classes: int,
    in_channels: int,
    width: float,
) -> nn.Module:
    """A 7x7 stem and a pooling, four stages of blocks that give ``growth`` times their inner
    channels, a linear classifier."""
    channels = scaled(64, width)
    net = nn.Sequential()
    pooling = nn.MaxPool2d(3, 2, padding=1)
    net.append(nn.Sequential(*conv_bn(in_channels, channels, 7, 2), nn.ReLU(), pooling))
    for i, depth in enumerate(depths):
        inner = scaled(64 * 2**i, width)
        for number in range(depth):
            net.append(block(channels, inner, 2 if i and not number else 1))
            channels = growth * inner
    net.extend((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)))
    he_init(net)
    return net


def resnet18(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Four stages of two basic blocks."""
    return _resnet(BasicBlock, 1, (2, 2, 2, 2), num_classes, in_channels, width)


def resnet50(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Bottlenecks, 3, 4, 6 and 3 to a stage."""
    return _resnet(Bottleneck, 4, (3, 4, 6, 3), num_classes, in_channels, width)


def resnet101(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Bottlenecks, 3, 4, 23 and 3 to a stage."""
    return _resnet(Bottleneck, 4, (3, 4, 23, 3), num_classes, in_channels, width)
