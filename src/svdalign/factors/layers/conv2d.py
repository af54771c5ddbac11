"""Factored ``nn.Conv2d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredConvolution

__all__ = ["SVDConv2d"]


class SVDConv2d(FactoredConvolution, dense=nn.Conv2d):
    """``nn.Conv2d`` with a factored kernel: see :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv2d, nn.Conv2d
