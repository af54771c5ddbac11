"""Factored ``nn.Conv1d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from .convolution import FactoredConvolution

__all__ = ["SVDConv1d"]


class SVDConv1d(FactoredConvolution, dense=nn.Conv1d):
    """``nn.Conv1d`` with a factored kernel: see :mod:`svdalign.factors.layers.convolution`."""

    convolve, module = F.conv1d, nn.Conv1d
