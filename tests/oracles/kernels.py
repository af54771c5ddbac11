"""Layouts of kernels as matrices, entry by entry."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor


def kernel_matrix(K: Tensor, scheme: str) -> Tensor:
    """(N, C, *kernel) as (N, C prod(kernel)), or with the later half of the axes beside N: of one
    axis the one, of two the second, of three the last two."""
    N, C, *kernel = K.shape
    first = len(kernel) // 2 if scheme == "spatial" else len(kernel)
    a, b = kernel[:first], kernel[first:]
    matrix = torch.zeros(N * math.prod(b), C * math.prod(a), dtype=K.dtype)
    for n, c, *place in product(*map(range, K.shape)):
        row, column = n, c
        for size, i in zip(b, place[first:], strict=True):
            row = row * size + i
        for size, i in zip(a, place[:first], strict=True):
            column = column * size + i
        matrix[row, column] = K[(n, c, *place)]
    return matrix
