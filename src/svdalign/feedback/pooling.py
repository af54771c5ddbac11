"""Pooling ``P``: the linear map from a unit's features to the vectors that its feedback reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._map_statistics import grid_means, token_mean


def pool(
    h: Tensor,
    grid: int | None,
    output_shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    *,
    like: Sequence[int] | None = None,
) -> Tensor:
    """``P(h)``: the features as rows for a feedback matrix, one row for each answer of the network.

    ``output_shape``: the shape of the network's output, with its classes: (B, C) for one answer a
    sample, (B, T, C) for one a token, (B, C, H, W) for one a pixel.

    - (B, d): as they are.
    - (B, C, h, w) and one answer a sample: averaged onto ``grid`` x ``grid`` cells (``None``
      keeps every position), flattened to (B, C g g). One answer a pixel: channels last,
      (B, h, w, C).
    - (B, T, d): per token if the output is per token, else averaged over tokens, (B, d).

    ``like``: the shape of the features for which the grid is made, by default that of ``h``. A
    smaller map is spread over that grid, so that a matrix made for maps of one size reads any size.

    ``dtype``: of the result, by default that of ``h``. Under autocast that is half precision, which
    is too coarse for sums.
    """
    dtype = h.dtype if dtype is None else dtype
    if h.ndim == 4:
        if len(output_shape) == 4:
            return h.permute(0, 2, 3, 1).to(dtype)
        if grid is not None:
            size = grid_size(h.shape if like is None else like, grid, output_shape)
            assert size is not None
            h = grid_means(h, size, dtype)
        return h.flatten(1).to(dtype)
    if h.ndim == 3:
        per_token = len(output_shape) == 3 and output_shape[1] == h.shape[1]
        return h.to(dtype) if per_token else token_mean(h, dtype)
    return h.flatten(1).to(dtype)


def grid_size(
    shape: Sequence[int], grid: int | None, output_shape: Sequence[int]
) -> tuple[int, int] | None:
    """The height and width of the grid onto which features of ``shape`` are averaged; None where
    they are not averaged."""
    if len(shape) != 4 or len(output_shape) == 4 or grid is None:
        return None
    return min(grid, shape[2]), min(grid, shape[3])


def pooled_size(shape: tuple[int, ...], grid: int | None, output_shape: tuple[int, ...]) -> int:
    """``d``: the last dimension of :func:`pool` for features of ``shape``, without computing it."""
    if len(shape) == 4:
        _, channels, height, width = shape
        if len(output_shape) == 4:
            return channels
        if grid is None:
            return channels * height * width
        return channels * math.prod(grid_size(shape, grid, output_shape) or (1, 1))
    return shape[-1] if len(shape) == 3 else math.prod(shape[1:])
