"""Statistics of a map (B, C, h, w): its means over a grid, and the spread of its channels.

Both are computed in one pass over the map. Their gradient is in closed form, computed some samples
at a time, in the map's own precision and memory format. Autograd would save and compute several
tensors of the map's size, and of twice its bytes under autocast.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._lazy import Recipe, by_parts_or_lazy, recipe_of
from ._parts import parts_of


def grid_means(h: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Adaptive average pooling in ``dtype``, (B, C, *size)."""
    return cast(Tensor, _Statistics.apply(h, size, dtype, None)[0])  # type: ignore[no-untyped-call]


def spread(h: Tensor) -> Tensor:
    """Standard deviation of each channel, dividing by the number of values; (B, C), in at least
    single precision. Its gradient where a channel is constant is 0. (On CPU ``torch.std`` takes
    ten times as long.)"""
    dtype = accumulation_dtype(h.dtype)
    return cast(Tensor, _Statistics.apply(h, None, None, dtype)[1])  # type: ignore[no-untyped-call]


def grid_means_and_spread(
    h: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`grid_means` and :func:`spread` together, whose gradient is then written once."""
    found: tuple[Tensor, Tensor] = _Statistics.apply(h, size, dtype, accumulation_dtype(h.dtype))  # type: ignore[no-untyped-call]
    return found


def token_mean(h: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean over tokens in ``dtype``, (B, T, d) to (B, d). By way of a sum, whose gradient is a
    view, the same for every token; that of a mean would be written for each."""
    return h.sum(1, dtype=dtype) / h.shape[1]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision for sums over maps of ``dtype``: at least single."""
    return torch.promote_types(dtype, torch.float32)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        size: tuple[int, int] | None,
        grid_dtype: torch.dtype | None,
        spread_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        recipe = recipe_of(h)
        if recipe.samples is None:
            recipe = replace(recipe, parts=parts_of(h))
        dtypes = [dtype for dtype in (grid_dtype, spread_dtype) if dtype is not None]
        dtype = max(dtypes, key=lambda d: torch.finfo(d).bits)
        cells = _cells(recipe.shape, size)
        grids, means, spreads = list[Tensor](), list[Tensor](), list[Tensor]()
        for rows in recipe.parts:
            part = recipe.read(rows, recipe.tensors).to(dtype)
            mean: Tensor | None = None
            if size is not None:
                if size == (1, 1):
                    grid = mean = part.mean((2, 3), keepdim=True)
                elif cells is not None:
                    grid = F.avg_pool2d(part, cells)
                else:
                    grid = F.adaptive_avg_pool2d(part, size)
                grids.append(grid.to(grid_dtype))
            if spread_dtype is not None:
                if mean is None:  # the mean of the means of equal cells is that of all
                    mean = (part if cells is None else grid).mean((2, 3), keepdim=True)
                means.append(mean)
                # The square of a difference in one visit; torch.nn.functional warns of the shapes.
                squares = torch.ops.aten.mse_loss(part, mean, 0)
                spreads.append(squares.mean((2, 3), keepdim=True).sqrt_())
                del squares
            del part  # before the next is made
        ctx.recipe, ctx.cells = recipe.without_tensors(), cells
        together = [torch.cat(found) if found else None for found in (grids, means, spreads)]
        pooled, means_, deviations = together
        tensors = () if spread_dtype is None else recipe.tensors  # for means the shape is enough
        ctx.save_for_backward(means_, deviations, *tensors)
        return pooled, None if deviations is None else deviations.squeeze((2, 3))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_grid: Tensor | None, d_spread: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        mean, deviation, *tensors = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        if d_grid is None and d_spread is None:
            return None, None, None, None
        # The gradient in h is slope h + start: a slope for each channel, a start for each channel
        # or cell of the grid.
        slope = start = None
        cells: tuple[int, int] | None = (recipe.shape[2], recipe.shape[3])
        if d_spread is not None:
            slope = d_spread[:, :, None, None] / (math.prod(recipe.shape[2:]) * deviation)
            slope = slope.masked_fill(deviation == 0, 0.0)
            start = -mean * slope
        if d_grid is not None and (cells := ctx.cells) is not None:
            by_cell = d_grid / math.prod(cells)
            start = by_cell if start is None else start + by_cell
        if start is not None:  # incoming gradients may have another memory format
            start = start.contiguous(memory_format=recipe.format)

        def run(rows: slice) -> Tensor:
            first = None if start is None else start[rows]
            if cells is None:
                assert d_grid is not None
                like = recipe.empty(rows).to(d_grid.dtype)
                full = torch.ops.aten._adaptive_avg_pool2d_backward(d_grid[rows], like)
                first = full if first is None else full.add_(first)
            assert first is not None
            first = first[:, :, :, None, :, None]  # as _in_cells has it
            if slope is None:
                out = recipe.empty(rows)
                _in_cells(out, cells).copy_(first)
                return out
            h = recipe.read(rows, tensors).to(slope.dtype)
            out = torch.addcmul(first, _in_cells(h, cells), slope[rows][..., None, None])
            return out.view(h.shape).to(recipe.dtype)

        return by_parts_or_lazy(run, recipe, ctx.next_functions[0][0]), None, None, None


def _cells(shape: tuple[int, ...], size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of the cells of a grid of ``size``; None where they are not all equal."""
    if size is None or any(n % cells for n, cells in zip(shape[2:], size, strict=True)):
        return None
    return shape[2] // size[0], shape[3] // size[1]


def _in_cells(h: Tensor, cells: tuple[int, int] | None) -> Tensor:
    """A view of a map (B, C, h, w) as (B, C, cells down, height of one, cells across, width of
    one); without ``cells`` each position is one."""
    (B, C, height, width), (rows, columns) = h.shape, cells or (1, 1)
    return h.view(B, C, height // rows, rows, width // columns, columns)
