"""CIFAR ResNets of He et al. 2016, section 4.2, with 1x1 convolutions on the skips that change
shape (their option B)."""

from __future__ import annotations

from torch import Tensor, nn

from ._layers import conv_bn, he_init, scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, ``(N, in, H, W)`` to ``(N, out, H/stride, W/stride)``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, 3, stride)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels, 3)
        same_shape = stride == 1 and in_channels == out_channels
        self.skip = nn.Identity() if same_shape else conv_bn(in_channels, out_channels, 1, stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += self.skip(x)  # in place: what no backward pass reads is not kept
        out: Tensor = self.relu2(h)
        return out


class ResNet(nn.Module):
    """``6 * depth + 2`` layers: a stem, three stages of ``depth`` blocks, a linear classifier."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        c1, c2, c3 = (scaled(c, width) for c in (16, 32, 64))
        self.stem = nn.Sequential(*conv_bn(in_channels, c1, 3), nn.ReLU())
        self.stage1 = _stage(depth, c1, c1, stride=1)
        self.stage2 = _stage(depth, c1, c2, stride=2)
        self.stage3 = _stage(depth, c2, c3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(c3, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(self.flatten(self.pool(h)))
        return logits


def _stage(depth: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(depth - 1))
    )


def resnet20(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Three blocks a stage."""
    return ResNet(3, num_classes, in_channels, width)


def resnet32(num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    """Five blocks a stage."""
    return ResNet(5, num_classes, in_channels, width)
