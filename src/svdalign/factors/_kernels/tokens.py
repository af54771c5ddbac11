"""Linear layers on tokens (B, ..., channels): the two halves of a factored one, with what follows,
between which only ``r`` channels are saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..._lazy import LazyTensor, Recipe, by_parts_or_lazy, read, reads_by_parts, recipe_of
from ..._parts import by_parts, parts_of
from ._gradients import add_part, wanted_gradients
from .expand import Expand


def reduce_tokens(x: Tensor, V: Tensor) -> Tensor:
    """``x V``, (B, ..., C) to (B, ..., r), of an ``x`` that may be lazy."""
    if not isinstance(x, LazyTensor):
        return x @ V
    return cast(Tensor, _Reduce.apply(x, V))  # type: ignore[no-untyped-call]


@reads_by_parts
class _Reduce(torch.autograd.Function):
    """Saves what the input is computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, V: Tensor) -> Tensor:
        recipe = recipe_of(x)
        ctx.recipe = recipe.without_tensors()
        ctx.save_for_backward(V, *recipe.tensors)
        return by_parts(lambda rows: recipe.read(rows, recipe.tensors) @ V, recipe.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        V, *tensors = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        V = V.to(grad.dtype)
        for_x, for_V = wanted_gradients(ctx, ctx.needs_input_grad)
        d_V: Tensor | None = None
        if for_V:
            for rows in recipe.parts:
                h = recipe.read(rows, tensors).to(grad.dtype)
                d_V = add_part(d_V, h.flatten(0, -2).mT @ read(grad, rows).flatten(0, -2))
                del h  # before the next is made
        if not for_x:
            return None, d_V

        def of_input(rows: slice) -> Tensor:
            d_x: Tensor = read(grad, rows) @ V.mT
            return d_x.to(recipe.dtype)

        like = replace(recipe, cheap=False)
        return by_parts_or_lazy(of_input, like, ctx.next_functions[0][0]), d_V


def expand_tokens(tail: nn.Sequential, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``tail(z weight^T + bias)``, (B, ..., r) to (B, ..., N); lazy if it is larger than ``z``.
    ``tail``: activations without parameters."""
    parts = parts_of(z.movedim(-1, 1), len(weight))

    def samples(rows: slice, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(z.dtype)
        return cast(Tensor, tail(F.linear(z[rows], weight.to(z.dtype), bias)))

    like: Recipe | None = None
    if len(weight) > z.shape[-1] and not torch.compiler.is_compiling():
        tensors = [t.detach() for t in (z, weight)]
        if bias is not None:  # a parameter may be updated before the last reader comes: copy it
            tensors.append(bias.detach().clone())
        shape = (*z.shape[:-1], len(weight))
        like = replace(recipe_of(z), tensors=tuple(tensors), shape=shape, parts=parts)
        like = replace(like, samples=samples)
    return cast(Tensor, Expand.apply(F.linear, tail, parts, like, z, weight, bias))  # type: ignore[no-untyped-call]
