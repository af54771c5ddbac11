"""Factored ``nn.Conv3d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredConvolution

__all__ = ["SVDConv3d"]


class SVDConv3d(FactoredConvolution, dense=nn.Conv3d):
    """``nn.Conv3d`` with a factored kernel: see :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv3d, nn.Conv3d
