"""The linear map ``P`` from a unit's features to what its feedback matrix reads."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["pool", "pooled_size"]


def pool(
    h: Tensor,
    grid: int | None,
    output_shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``P(h)``: features as rows that a feedback matrix can read, aligned to the network's output.

    ``output_shape`` is the shape of the network's output, classes included: (B, C) for one answer a
    sample, (B, T, C) for one a token, (B, C, H, W) for one a pixel.

    - (B, d): as it is.
    - (B, C, h, w) and one answer a sample: averaged onto a ``grid`` x ``grid`` raster (``None``
      keeps every position), flattened to (B, C g g). One answer a pixel: channels last,
      (B, h, w, C).
    - (B, T, d): per token if the output is per token, else averaged over tokens, (B, d).

    What autocast hands on, in half precision, is too coarse for sums: the result is in ``dtype``,
    that of ``h`` by default.
    """
    dtype = h.dtype if dtype is None else dtype
    if h.ndim == 4:
        if len(output_shape) == 4:
            return h.permute(0, 2, 3, 1).to(dtype)
        if grid is not None:
            size = (min(grid, h.shape[2]), min(grid, h.shape[3]))
            # Mean over both axes is the 1 x 1 raster, and many times faster than adaptive pooling.
            h = h.mean((2, 3), dtype=dtype) if size == (1, 1) else _raster(h, size, dtype)
        return h.flatten(1).to(dtype)
    if h.ndim == 3:
        per_token = len(output_shape) == 3 and output_shape[1] == h.shape[1]
        return h.to(dtype) if per_token else h.mean(1, dtype=dtype)
    return h.flatten(1).to(dtype)


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


class _Raster(torch.autograd.Function):
    """Adaptive average pooling of ``h`` (B, C, h, w) in ``dtype``. Its gradient is made in ``h``'s
    own precision and memory format: torch's is made as the incoming one is, and then copied."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(h)
        return F.adaptive_avg_pool2d(h.to(dtype), size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        last = h.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        grad = grad.to(h.dtype).contiguous(memory_format=form)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad, h), None, None


def _raster(h: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return cast(Tensor, _Raster.apply(h, size, dtype))  # type: ignore[no-untyped-call]
