"""Layouts of convolution kernels as matrices, entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_of(weight: Tensor, scheme: str) -> Tensor:
    """(N, C, H, W) as (N W, C H) or (N, C H W), and (m, n) as it is, one entry at a time."""
    if weight.ndim == 2:
        return weight
    N, C, H, W = weight.shape
    shape = (N * W, C * H) if scheme == "spatial" else (N, C * H * W)
    matrix = torch.zeros(shape, dtype=weight.dtype)
    for n in range(N):
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    row, column = (
                        (n * W + w, c * H + h) if scheme == "spatial" else (n, (c * H + h) * W + w)
                    )
                    matrix[row, column] = weight[n, c, h, w]
    return matrix
