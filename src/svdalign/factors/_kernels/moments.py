"""Mean and covariance of a map's positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._lazy import by_parts_or_lazy, recipe_of
from ..._map_statistics import accumulation_dtype
from ..._parts import parts_of
from ._gradients import as_map, positions


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (r,) and covariance (r, r), dividing by their number, of the positions of ``z``
    (B, r, h, w); in at least single precision."""
    found: tuple[Tensor, Tensor] = _Moments.apply(z)  # type: ignore[no-untyped-call]
    return found


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        count, dtype = z.numel() // z.shape[1], accumulation_dtype(z.dtype)
        # Moments about the mean of the first sample: about zero, large squares would lose digits.
        # That mean is at most sqrt(B) standard deviations away from the mean of all B samples.
        start = positions(z[:1]).to(dtype).mean(0)
        total, cov = torch.zeros_like(start), start.new_zeros(len(start), len(start))
        for rows in parts_of(z):
            shifted = positions(z[rows]).to(dtype) - start
            total += shifted.sum(0)
            cov.addmm_(shifted.mT, shifted)
            del shifted  # before the next is made
        shift = total / count
        mean = start + shift
        ctx.save_for_backward(z, mean)
        return mean, torch.addr(cov, shift, shift, beta=1 / count, alpha=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_cov: Tensor) -> Tensor:
        z, mean = ctx.saved_tensors
        count, (_, _, h, w) = z.numel() // z.shape[1], z.shape
        slope = (d_cov + d_cov.mT) / count
        start = (d_mean / count - mean @ slope).to(z.dtype)
        slope = slope.to(z.dtype)

        def run(rows: slice) -> Tensor:
            return as_map(torch.addmm(start, positions(z[rows]), slope), h, w)

        like = replace(recipe_of(z), parts=parts_of(z))
        return by_parts_or_lazy(run, like, ctx.next_functions[0][0])
