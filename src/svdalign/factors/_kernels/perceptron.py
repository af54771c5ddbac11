"""Two linear layers on tokens (B, ..., channels) and what is between them, of which only ``r``
channels are saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..._autocast import present_autocast
from ..._lazy import LazyTensor, read, reads_by_parts, recipe_of
from ..._parts import by_parts, parts_of
from ._gradients import gradients_by_parts, gradients_of, to_compute_from, wanted_gradients
from .expand import expand_by_parts


class _Wide(LazyTensor):
    """The output of a first layer. ``times``: its product with a matrix, as a part of the same
    graph. A copy, such as a unit passes on to the next, has none."""

    times: Callable[[Tensor], Tensor] | None = None


def reduce_tokens(x: Tensor, V: Tensor) -> Tensor:
    """``x V``, (B, ..., C) to (B, ..., r). Where ``x`` is what :func:`expand_tokens` returned it is
    computed some samples at a time, and again in the backward pass."""
    if isinstance(x, _Wide) and x.times is not None:
        return x.times(V)
    return x @ V


def expand_tokens(tail: nn.Sequential, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``tail(z weight^T + bias)``, (B, ..., r) to (B, ..., N); lazy if it is larger than ``z``.
    ``tail``: activations without parameters."""
    parts = parts_of(z.movedim(-1, 1), len(weight))

    def run(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, tail(F.linear(z, weight, bias)))

    def samples(rows: slice, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return run(z[rows], weight.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def times(V: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(run, parts, z, weight, bias, V))  # type: ignore[no-untyped-call]

    if len(weight) <= z.shape[-1] or torch.compiler.is_compiling():
        return expand_by_parts(run, parts, z, weight, bias)
    tensors, shape = to_compute_from(z, weight, bias), (*z.shape[:-1], len(weight))
    like = replace(recipe_of(z), tensors=tensors, shape=shape, parts=parts, samples=samples)
    wide = expand_by_parts(run, parts, z, weight, bias, unwritten=lambda: _Wide(like))
    cast(_Wide, wide).times = times
    return wide


@reads_by_parts
class _Product(torch.autograd.Function):
    """``run(z, weight, bias) V``. Saves ``z`` and the matrices; what ``run`` returns is computed
    again in the backward pass, once for all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        parts: list[slice],
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        V: Tensor,
    ) -> Tensor:
        ctx.run, ctx.parts, ctx.autocast = run, parts, present_autocast()
        ctx.save_for_backward(z, weight, bias, V)
        return by_parts(lambda rows: run(z[rows], weight, bias) @ V, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, V = ctx.saved_tensors
        z, weight, bias = z.detach(), weight.detach(), None if bias is None else bias.detach()
        wanted = wanted_gradients(ctx, ctx.needs_input_grad[2:])
        *of_first, of_second = wanted
        layer = zip((weight, bias), of_first[1:], strict=True)
        weights = [w.requires_grad_() for w, want in layer if want]
        V = V.detach().to(grad.dtype)

        def run(rows: slice) -> list[Tensor | None]:
            part, g = z[rows].requires_grad_(of_first[0]), read(grad, rows)
            with torch.enable_grad(), ctx.autocast():
                h = ctx.run(part, weight, bias)
            d_V = h.detach().flatten(0, -2).mT @ g.flatten(0, -2) if of_second else None
            return [*gradients_of(h, part, weights, of_first, g @ V.mT), d_V]

        return None, None, *gradients_by_parts(run, ctx.parts, wanted)
