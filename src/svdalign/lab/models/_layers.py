"""What the networks share: width scaling, the convolution block, initialisation."""

from __future__ import annotations

import torch
from torch import nn


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded, at least 1."""
    return max(1, round(channels * width))


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the map's size at stride 1, and its batch norm (hence no bias)."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def he_init(net: nn.Module) -> None:
    """He et al. 2015, fan out, for every convolution of ``net``, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            with torch.no_grad():
                module.weight.mul_(module.groups**0.5)  # torch counts the fan of all groups
