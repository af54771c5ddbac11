"""The second convolution, ReLU and max pooling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from ..._lazy import LazyTensor, by_parts_or_lazy, read, reads_by_parts, recipe_of
from ..._map_statistics import accumulation_dtype
from ..._parts import by_parts, empty, parts_of, worth_holding
from ..layers import SVDConv2d
from ._gradients import (
    as_map,
    gradients_by_parts,
    positions,
    to_compute_from,
    wanted_gradients,
)
from .reduce import Reduce

aten = torch.ops.aten


@reads_by_parts
class ExpandReLU(torch.autograd.Function):
    """The second convolution, ReLU and, if ``pool`` is given, max pooling. Saves ``z``; with
    pooling also the output and the positions of the maxima."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: SVDConv2d,
        pool: nn.MaxPool2d | None,
        lazy: bool,
        z: Tensor,
        second: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.layer, ctx.window = layer, [] if pool is None else _settings(pool)
        parts = parts_of(z, len(second))
        places: list[Tensor] = []

        def run(rows: slice) -> Tensor:
            y = layer.expand(z[rows], second, bias)
            ctx.shape = y.shape[1:]
            if pool is None:
                return y.relu_()
            y, place = F.max_pool2d(y, *ctx.window, return_indices=True)
            if not places:
                ctx.corners, ctx.narrow = _corners(ctx.window, ctx.shape[-1], place)
            places.append(place.sub_(ctx.corners).to(ctx.narrow))
            return y.relu_()  # after the pooling, which gives the same with a quarter of the work

        unwritten: Tensor | None = None
        if lazy and pool is None:
            unwritten = _lazy_if_smaller(layer, z, second, bias, parts)
        out = by_parts(run, parts) if unwritten is None else unwritten
        recipe = recipe_of(out)
        ctx.recipe = recipe.without_tensors()
        ctx.save_for_backward(z, second, torch.cat(places) if places else None, *recipe.tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, second, places, *tensors = ctx.saved_tensors
        second, window = second.to(z.dtype), ctx.window
        parts = parts_of(z, len(second))
        wanted = wanted_gradients(ctx, ctx.needs_input_grad[3:])
        full = empty((parts[0].stop, *ctx.shape), like=z) if window else z

        def run(rows: slice, wanted: list[bool]) -> Iterable[Tensor | None]:
            out = ctx.recipe.read(rows, tensors)
            g = aten.threshold_backward(read(grad, rows), out, 0)
            del out
            if window:
                # Of the pooling's input only the shape is read. The reader of a lazy gradient may
                # ask for more samples at a time than there are in a part.
                like = (
                    full[: len(g)] if len(g) <= len(full) else empty((len(g), *ctx.shape), like=z)
                )
                place = ctx.corners + places[rows]
                g = aten.max_pool2d_with_indices_backward.grad_input(
                    g, like, *window, place, grad_input=like
                )
                del place  # before the next is made
            return _expansion_gradients(ctx.layer, z[rows], second, g, wanted)

        twice = wanted[0] and len(parts) > 1 and recipe_of(grad).cheap and _read_once(ctx)
        if worth_holding(z.nbytes) or not twice:
            found = gradients_by_parts(lambda rows: run(rows, wanted), parts, wanted)
            return None, None, None, *found

        def of_z(rows: slice) -> Tensor:
            dz, *_ = run(rows, [True, False, False])
            return cast(Tensor, dz)

        only_weights = [False, *wanted[1:]]
        _, *found = gradients_by_parts(lambda rows: run(rows, only_weights), parts, only_weights)
        like = replace(recipe_of(z), parts=parts, cheap=False)
        return None, None, None, by_parts_or_lazy(of_z, like, ctx.next_functions[0][0]), *found


def _read_once(ctx: Any) -> bool:
    """Whether the gradient in ``z`` will be read once, for the weights of a first convolution whose
    input needs no gradient. Then a large one can be computed by parts in place of stored."""
    node = ctx.next_functions[0][0]
    first = getattr(node, "_forward_cls", None) is Reduce
    return first and node.next_functions[0][0] is None


def _lazy_if_smaller(
    layer: SVDConv2d, z: Tensor, second: Tensor, bias: Tensor | None, parts: list[slice]
) -> LazyTensor | None:
    """``relu(W z + b)`` as a lazy tensor if it is larger than ``z``, else None."""
    stride, padding, dilation = layer.second_settings()
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            z.shape[2:], padding, dilation, second.shape[2:], stride, strict=True
        )
    ]
    shape = (len(z), len(second), *size)
    smaller = z.numel() < math.prod(shape)
    if not smaller or torch.compiler.is_compiling():
        return None

    def samples(rows: slice, z: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        return layer.expand(z[rows], second.to(z.dtype), bias).relu_()

    tensors = to_compute_from(z, second, bias)
    like = replace(recipe_of(z), tensors=tensors, shape=shape, parts=parts)
    return LazyTensor(replace(like, samples=samples))


def _expansion_gradients(
    layer: SVDConv2d, z: Tensor, second: Tensor, g: Tensor, wanted: list[bool]
) -> Iterable[Tensor | None]:
    """Gradients of the second convolution in ``z``, its kernel and its bias, from the gradient
    ``g`` in its output. For a 1 x 1 convolution they are products of matrices."""
    last = torch.channels_last
    if layer.scheme == "spatial" or not g.is_contiguous(memory_format=last):
        found: Iterable[Tensor | None] = aten.convolution_backward(
            g, z, second, [len(second)], *layer.second_settings(), False, [0, 0], 1, wanted
        )
        return found
    rows, W = positions(g), second[:, :, 0, 0]
    for_z, for_second, for_bias = wanted
    return (
        as_map(rows @ W, *z.shape[2:]) if for_z else None,
        (rows.mT @ positions(z)).reshape(second.shape) if for_second else None,
        rows.sum(0, dtype=accumulation_dtype(g.dtype)) if for_bias else None,
    )


def _settings(pool: nn.MaxPool2d) -> list[Any]:
    """Kernel size, stride, padding, dilation, by axis, and ceil mode."""
    by_axis = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return [*map(_pair, by_axis), pool.ceil_mode]


def _corners(window: list[Any], width: int, place: Tensor) -> tuple[Tensor, torch.dtype]:
    """The index in a flattened map of ``width`` columns where each window of a max pooling begins,
    (h, w) of its output; and a dtype for the offset from there to a maximum, mostly one byte."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = window
    rows, columns = (torch.arange(n, device=place.device) for n in place.shape[-2:])
    corners = (rows * sh - ph)[:, None] * width + (columns * sw - pw)
    return corners, torch.uint8 if dh * (kh - 1) * width + dw * (kw - 1) < 256 else torch.int32
