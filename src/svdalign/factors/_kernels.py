"""The arithmetic of a fused convolution: autograd functions that save little and work by parts.

Each saves the map of ``r`` channels alone and computes the maps of ``N`` channels again, some
samples at a time, where its backward pass needs them. Outputs and gradients of ``N`` channels that
only these functions read are lazy (:mod:`svdalign._lazy`): they are never written as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from .._autocast import present_autocast
from .._lazy import (
    LazyTensor,
    Recipe,
    by_parts,
    by_parts_or_lazy,
    empty,
    parts_of,
    read,
    reads_by_parts,
    recipe_of,
)
from .._map_statistics import accumulation_dtype

if TYPE_CHECKING:
    from .fused import FusedConv2d

__all__ = ["expand", "moments", "reduce"]

aten = torch.ops.aten


def reduce(layer: FusedConv2d, x: Tensor) -> Tensor:
    """The first convolution of ``layer``: ``x`` (B, C, h, w) to (B, r, h', w')."""
    if isinstance(layer.paddings()[0], str):  # uneven, which its gradient does not know of
        return layer.reduce(x)
    return cast(Tensor, _Reduce.apply(layer, x, layer.kernels()[0]))  # type: ignore[no-untyped-call]


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (r,) and covariance (r, r), dividing by their number, of the positions of ``z``
    (B, r, h, w); in at least single precision."""
    found: tuple[Tensor, Tensor] = _Moments.apply(z)  # type: ignore[no-untyped-call]
    return found


def expand(
    layer: FusedConv2d, z: Tensor, second: Tensor, bias: Tensor | None, tail: list[nn.Module]
) -> Tensor:
    """The second convolution of ``layer``, of ``z`` (B, r, h, w) with the kernel ``second``, and
    the modules of ``tail``, which treat every sample by itself."""
    if not tail:
        return layer.expand(z, second, bias)
    kinds = [type(module) for module in tail]
    even = not isinstance(layer.paddings()[1], str)
    if even and kinds in ([nn.ReLU], [nn.ReLU, nn.MaxPool2d]):
        pool = tail[1] if len(tail) > 1 else None
        return cast(Tensor, _ExpandReLU.apply(layer, pool, z, second, bias))  # type: ignore[no-untyped-call]
    rest = nn.Sequential(*tail)
    weights = (second, bias, *rest.parameters())
    return cast(Tensor, _Expand.apply(layer, rest, z, *weights))  # type: ignore[no-untyped-call]


@reads_by_parts
class _Reduce(torch.autograd.Function):
    """First convolution. Of a lazy input it saves what that is computed from."""

    @staticmethod
    def forward(ctx: Any, layer: FusedConv2d, x: Tensor, first: Tensor) -> Tensor:
        recipe = recipe_of(x)
        ctx.layer, ctx.recipe = layer, recipe.without_tensors()
        ctx.save_for_backward(first, *recipe.tensors)
        return by_parts(lambda rows: layer.reduce(recipe.read(rows, recipe.tensors)), recipe.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *tensors = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        if recipe.samples is None:
            recipe = replace(recipe, parts=recipe_of(grad).parts)
        settings = ctx.layer.first_settings()
        kernel = first.to(grad.dtype)
        for_x, for_first = _wanted(ctx, ctx.needs_input_grad[1:])

        def gradients(rows: slice, x: Tensor, wanted: list[bool]) -> list[Tensor | None]:
            found: list[Tensor | None] = aten.convolution_backward(
                read(grad, rows), x.to(grad.dtype), kernel, None, *settings, False, [0, 0], 1,
                [*wanted, False],
            )  # fmt: skip
            return found

        def of_input(rows: slice) -> Tensor:
            # For the input's gradient its shape is enough.
            (dx, *_) = gradients(rows, recipe.empty(rows), [True, False])
            return cast(Tensor, dx).to(recipe.dtype)

        d_first: Tensor | None = None
        if for_first:
            for rows in recipe.parts:
                dW = gradients(rows, recipe.read(rows, tensors), [False, True])[1]
                d_first = _add(d_first, dW)
        if not for_x:
            return None, None, d_first
        like = replace(recipe, cheap=False)
        return None, by_parts_or_lazy(of_input, like, ctx.next_functions[0][0]), d_first


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        count, dtype = z.numel() // z.shape[1], accumulation_dtype(z.dtype)
        # Large squares would lose digits: moments about the mean of the first sample. It is no
        # farther from the mean of all B than sqrt(B) standard deviations.
        start = _positions(z[:1]).to(dtype).mean(0)
        total, cov = torch.zeros_like(start), start.new_zeros(len(start), len(start))
        for rows in parts_of(z):
            shifted = _positions(z[rows]).to(dtype) - start
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
            return _map(torch.addmm(start, _positions(z[rows]), slope), h, w)

        like = replace(recipe_of(z), parts=parts_of(z))
        return by_parts_or_lazy(run, like, ctx.next_functions[0][0])


def _positions(z: Tensor) -> Tensor:
    """The positions of a map, (B h w, r): a view of one that is held channels last."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _map(positions: Tensor, h: int, w: int) -> Tensor:
    """The inverse of :func:`_positions`."""
    return positions.reshape(-1, h, w, positions.shape[1]).permute(0, 3, 1, 2)


@reads_by_parts
class _ExpandReLU(torch.autograd.Function):
    """Second convolution, ReLU and, if ``pool`` is given, max pooling. Saves ``z`` and, of pooled
    maps, the output and the places of the maxima."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: FusedConv2d,
        pool: nn.MaxPool2d | None,
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
            return y.relu_()  # after pooling: the same, and a quarter of the work

        lazy = None if pool is not None else _lazy_if_smaller(layer, z, second, bias, parts)
        out = by_parts(run, parts) if lazy is None else lazy
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
        wanted = _wanted(ctx, ctx.needs_input_grad[2:])
        full = empty((parts[0].stop, *ctx.shape), like=z) if window else z

        def run(rows: slice, wanted: list[bool]) -> Iterable[Tensor | None]:
            out = ctx.recipe.read(rows, tensors)
            g = aten.threshold_backward(read(grad, rows), out, 0)
            del out
            if window:
                # Of the pooling's input the shape is read alone. Who reads a lazy gradient may
                # want more samples at a time than these parts.
                like = (
                    full[: len(g)] if len(g) <= len(full) else empty((len(g), *ctx.shape), like=z)
                )
                place = ctx.corners + places[rows]
                g = aten.max_pool2d_with_indices_backward.grad_input(
                    g, like, *window, place, grad_input=like
                )
                del place  # before the next is made
            return _expansion_gradients(ctx.layer, z[rows], second, g, wanted)

        if not (wanted[0] and len(parts) > 1 and recipe_of(grad).cheap and _read_once(ctx)):
            return None, None, *_gradients_by_parts(lambda rows: run(rows, wanted), parts, wanted)

        def of_z(rows: slice) -> Tensor:
            dz, *_ = run(rows, [True, False, False])
            return cast(Tensor, dz)

        only_weights = [False, *wanted[1:]]
        _, *found = _gradients_by_parts(lambda rows: run(rows, only_weights), parts, only_weights)
        like = replace(recipe_of(z), parts=parts, cheap=False)
        return None, None, by_parts_or_lazy(of_z, like, ctx.next_functions[0][0]), *found


def _read_once(ctx: Any) -> bool:
    """Whether the gradient in ``z`` is lazy and read once: by the weights of the first convolution,
    whose input needs no gradient. Computing it again for that is cheaper than to hold it."""
    node = ctx.next_functions[0][0]
    first = getattr(node, "_forward_cls", None) is _Reduce
    return first and node.next_functions[0][0] is None


def _lazy_if_smaller(
    layer: FusedConv2d, z: Tensor, second: Tensor, bias: Tensor | None, parts: list[slice]
) -> LazyTensor | None:
    """``relu(W z + b)`` as a lazy tensor, if that is read by parts and is larger than ``z``."""
    stride, padding, dilation = layer.second_settings()
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            z.shape[2:], padding, dilation, second.shape[2:], stride, strict=True
        )
    ]
    shape = (len(z), len(second), *size)
    smaller = z.numel() < math.prod(shape)
    if not (layer.read_by_parts and smaller) or torch.compiler.is_compiling():
        return None

    def samples(rows: slice, z: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        return layer.expand(z[rows], second.to(z.dtype), bias).relu_()

    tensors = [t.detach() for t in (z, second)]
    if bias is not None:  # it may be a parameter, which is updated before the last reader comes
        tensors.append(bias.detach().clone())
    like = replace(recipe_of(z), tensors=tuple(tensors), shape=shape, parts=parts)
    return LazyTensor(replace(like, samples=samples))


def _expansion_gradients(
    layer: FusedConv2d, z: Tensor, second: Tensor, g: Tensor, wanted: list[bool]
) -> Iterable[Tensor | None]:
    """Gradients of the second convolution in ``z``, its kernel and its bias, given that in its
    output; products of matrices where it is a 1 x 1 convolution."""
    last = torch.channels_last
    if layer.scheme == "spatial" or not g.is_contiguous(memory_format=last):
        found: Iterable[Tensor | None] = aten.convolution_backward(
            g, z, second, [len(second)], *layer.second_settings(), False, [0, 0], 1, wanted
        )
        return found
    rows, W = _positions(g), second[:, :, 0, 0]
    for_z, for_second, for_bias = wanted
    return (
        _map(rows @ W, *z.shape[2:]) if for_z else None,
        (rows.mT @ _positions(z)).reshape(second.shape) if for_second else None,
        rows.sum(0, dtype=accumulation_dtype(g.dtype)) if for_bias else None,
    )


@reads_by_parts
class _Expand(torch.autograd.Function):
    """Second convolution and any ``tail``. Saves ``z`` and the weights, and computes the rest again
    in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: FusedConv2d,
        tail: nn.Sequential,
        z: Tensor,
        second: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.tail = layer, tail
        ctx.autocast = present_autocast()
        ctx.save_for_backward(z, second, bias)
        parts = parts_of(z, len(second))
        return by_parts(lambda rows: tail(layer.expand(z[rows], second, bias)), parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, second, bias = ctx.saved_tensors
        z, second, bias = z.detach(), second.detach(), None if bias is None else bias.detach()
        weights = (second, bias, *ctx.tail.parameters())
        wanted = _wanted(ctx, ctx.needs_input_grad[2:])
        inputs = [w.requires_grad_() for w, want in zip(weights, wanted[1:], strict=True) if want]

        def run(rows: slice) -> Iterator[Tensor | None]:
            part = z[rows].requires_grad_(wanted[0])
            with torch.enable_grad(), ctx.autocast():
                out = ctx.tail(ctx.layer.expand(part, second, bias))
            found = iter(torch.autograd.grad(out, [part] * wanted[0] + inputs, read(grad, rows)))
            return (next(found) if want else None for want in wanted)

        return None, None, *_gradients_by_parts(run, parts_of(z, len(second)), wanted)


def _gradients_by_parts(
    run: Callable[[slice], Iterable[Tensor | None]], parts: list[slice], wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of a map, put together, and of weights, summed, from those that ``run`` finds for
    ``parts`` of the samples; None where none is wanted."""
    sums: list[Tensor | None] = [None] * len(wanted[1:])

    def one(rows: slice) -> Any:
        part, *found = run(rows)
        sums[:] = [_add(a, b) for a, b in zip(sums, found, strict=True)]
        return part

    if wanted[0]:
        return [by_parts(one, parts), *sums]
    for rows in parts:
        one(rows)
    return [None, *sums]


def _wanted(ctx: Any, needed: Sequence[bool]) -> list[bool]:
    """Which of the gradients that are ``needed`` this backward pass is for: of no weights where it
    only carries a signal upstream."""
    nodes = [node for node, _ in ctx.next_functions]
    if len(nodes) < len(needed):  # there is no bias: for None autograd has no entry
        nodes.insert(2, None)
    return [n and _asked_for(node) for n, node in zip(needed, nodes, strict=True)]


def _asked_for(node: Any) -> bool:
    """Whether the running backward pass goes on to ``node``, the source of a tensor that needs a
    gradient."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer for a leaf that ``torch.autograd.grad`` is asked for
        return True


def _settings(pool: nn.MaxPool2d) -> list[Any]:
    """Kernel size, stride, padding, dilation, by axis, and ceil mode."""
    by_axis = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return [*map(_pair, by_axis), pool.ceil_mode]


def _corners(window: list[Any], width: int, place: Tensor) -> tuple[Tensor, torch.dtype]:
    """Where in a map of ``width`` the windows of a max pooling begin, (h, w) of its output, and a
    dtype for the way from there to a maximum: mostly a byte does."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = window
    rows, columns = (torch.arange(n, device=place.device) for n in place.shape[-2:])
    corners = (rows * sh - ph)[:, None] * width + (columns * sw - pw)
    return corners, torch.uint8 if dh * (kh - 1) * width + dw * (kw - 1) < 256 else torch.int32


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sums of parts, in at least single precision."""
    if b is None:
        return a
    b = b if b.dtype == torch.float64 else b.float()
    return b if a is None else a.add_(b)
