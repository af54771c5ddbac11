"""Factored ``nn.ConvTranspose1d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredTransposedConvolution

__all__ = ["SVDConvTranspose1d"]


class SVDConvTranspose1d(FactoredTransposedConvolution, dense=nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a factored kernel: see
    :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv_transpose1d, nn.ConvTranspose1d
