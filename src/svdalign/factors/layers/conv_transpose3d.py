"""Factored ``nn.ConvTranspose3d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredTransposedConvolution

__all__ = ["SVDConvTranspose3d"]


class SVDConvTranspose3d(FactoredTransposedConvolution, dense=nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a factored kernel: see
    :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv_transpose3d, nn.ConvTranspose3d
