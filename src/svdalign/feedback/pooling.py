"""The linear map ``P`` from a unit's features to what its feedback matrix reads."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

__all__ = ["pool", "pooled_size"]


def pool(h: Tensor, grid: int | None, output_shape: tuple[int, ...]) -> Tensor:
    """``P(h)``: features as rows that a feedback matrix can read, aligned to the network's output.

    ``output_shape`` is the shape of the network's output, classes included: (B, C) for one answer a
    sample, (B, T, C) for one a token, (B, C, H, W) for one a pixel.

    - (B, d): as it is.
    - (B, C, h, w) and one answer a sample: averaged onto a ``grid`` x ``grid`` raster (``None``
      keeps every position), flattened to (B, C g g). One answer a pixel: channels last,
      (B, h, w, C).
    - (B, T, d): per token if the output is per token, else averaged over tokens, (B, d).
    """
    if h.ndim == 4:
        if len(output_shape) == 4:
            return h.permute(0, 2, 3, 1)
        if grid is not None:
            size = (min(grid, h.shape[2]), min(grid, h.shape[3]))
            # Mean over both axes is the 1 x 1 raster, and many times faster than adaptive pooling.
            h = h.mean((2, 3)) if size == (1, 1) else F.adaptive_avg_pool2d(h, size)
        return h.flatten(1)
    if h.ndim == 3:
        per_token = len(output_shape) == 3 and output_shape[1] == h.shape[1]
        return h if per_token else h.mean(1)
    return h.flatten(1)


def pooled_size(shape: tuple[int, ...], grid: int | None, output_shape: tuple[int, ...]) -> int:
    """``d``: the last dimension of :func:`pool` for features of ``shape``, without computing it."""
    if len(shape) == 4:
        _, channels, height, width = shape
        if len(output_shape) == 4:
            return channels
        if grid is None:
            return channels * height * width
        return channels * min(grid, height) * min(grid, width)
    return shape[-1] if len(shape) == 3 else math.prod(shape[1:])
