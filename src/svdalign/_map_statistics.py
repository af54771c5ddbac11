"""What is read off a map (B, C, h, w): its means over a raster, and the spread of its channels.

Both in one function and in closed form: the gradient in the map is made once, some samples at a
time, in the map's own precision and memory format. Autograd would hold and make several maps of its
size, and of twice its bytes under autocast, which decide the peak of a unit that holds little else.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._saved import Held, by_parts, hold, parts_of

__all__ = ["raster", "raster_and_spread", "spread"]


def raster(h: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Adaptive average pooling in ``dtype``, (B, C, *size)."""
    return cast(Tensor, _Readings.apply(h, size, dtype, None)[0])  # type: ignore[no-untyped-call]


def spread(h: Tensor) -> Tensor:
    """Standard deviation of each channel, dividing by the number of values; (B, C), in at least
    single precision. Its gradient where a channel is constant is 0. (On CPU ``torch.std`` takes
    twenty times as long.)"""
    return cast(Tensor, _Readings.apply(h, None, None, statistics(h.dtype))[1])  # type: ignore[no-untyped-call]


def raster_and_spread(
    h: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`raster` and :func:`spread` with one gradient."""
    found: tuple[Tensor, Tensor] = _Readings.apply(h, size, dtype, statistics(h.dtype))  # type: ignore[no-untyped-call]
    return found


def statistics(dtype: torch.dtype) -> torch.dtype:
    """The precision of statistics of maps of ``dtype``, whatever autocast hands on."""
    return torch.promote_types(dtype, torch.float32)


class _Readings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        size: tuple[int, int] | None,
        raster_dtype: torch.dtype | None,
        spread_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        # Of a part in half precision copies are made in single precision.
        copies = 1 if h.dtype == statistics(h.dtype) else 4
        held, parts = hold(h), parts_of(h, copies * h.shape[1])
        ctx.held, ctx.parts = held.without_tensors(), parts
        raster = found = mean = None
        if size is not None:
            raster = by_parts(
                lambda rows: F.adaptive_avg_pool2d(h[rows].to(raster_dtype), size), parts
            )
        if spread_dtype is not None:
            mean = h.mean((2, 3), keepdim=True, dtype=spread_dtype)
            found = by_parts(
                lambda rows: (h[rows] - mean[rows]).square_().mean((2, 3), keepdim=True).sqrt_(),
                parts,
            )
        ctx.save_for_backward(mean, found, *held.tensors)
        return raster, None if found is None else found.squeeze((2, 3))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_raster: Tensor | None, d_spread: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        mean, found, *tensors = ctx.saved_tensors
        held: Held = ctx.held
        if d_raster is not None:
            d_raster = d_raster.to(held.dtype).contiguous(memory_format=held.format)
        if d_spread is not None:  # (h - mean) slope, or start + h slope
            positions = math.prod(held.shape) // mean.numel()
            slope = d_spread[:, :, None, None] / (positions * found)
            slope = slope.masked_fill(found == 0, 0.0)
            start = -mean * slope

        def run(rows: slice) -> Tensor:
            part: Tensor | None = None
            if d_raster is not None:
                like = held.like(rows, tensors)
                part = torch.ops.aten._adaptive_avg_pool2d_backward(d_raster[rows], like)
                if d_spread is None:
                    return part
            h = held.of(rows, tensors)
            if h.dtype != slope.dtype:  # half precision: not to be rounded before it is all there
                taught = h.to(slope.dtype).sub_(mean[rows]).mul_(slope[rows]).to(h.dtype)
                return taught if part is None else part.add_(taught)
            if part is None:
                return torch.addcmul(start[rows], h, slope[rows])
            return part.addcmul_(h, slope[rows]).add_(start[rows])

        nothing = d_raster is None and d_spread is None
        return None if nothing else by_parts(run, ctx.parts), None, None, None
