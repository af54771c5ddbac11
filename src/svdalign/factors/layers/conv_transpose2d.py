"""Factored ``nn.ConvTranspose2d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredTransposedConvolution

__all__ = ["SVDConvTranspose2d"]


class SVDConvTranspose2d(FactoredTransposedConvolution, dense=nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a factored kernel: see
    :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv_transpose2d, nn.ConvTranspose2d
