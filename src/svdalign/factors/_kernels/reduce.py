"""The first convolution, of a map that may be lazy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._lazy import Recipe, by_parts_or_lazy, read, reads_by_parts, recipe_of
from ..._parts import by_parts
from ..layers import SVDConv2d
from ._gradients import add_part, wanted_gradients


def reduce(layer: SVDConv2d, x: Tensor) -> Tensor:
    """The first convolution of ``layer``: ``x`` (B, C, h, w) to (B, r, h', w')."""
    if isinstance(layer.paddings()[0], str):  # uneven padding, for which Reduce has no gradient
        return layer.reduce(x)
    return cast(Tensor, Reduce.apply(layer, x, layer.kernels()[0]))  # type: ignore[no-untyped-call]


@reads_by_parts
class Reduce(torch.autograd.Function):
    """The first convolution. If its input is lazy, it saves what that is computed from."""

    @staticmethod
    def forward(ctx: Any, layer: SVDConv2d, x: Tensor, first: Tensor) -> Tensor:
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
        for_x, for_first = wanted_gradients(ctx, ctx.needs_input_grad[1:])

        def gradients(rows: slice, x: Tensor, wanted: list[bool]) -> list[Tensor | None]:
            found: list[Tensor | None] = torch.ops.aten.convolution_backward(
                read(grad, rows), x.to(grad.dtype), kernel, None, *settings, False, [0, 0], 1,
                [*wanted, False],
            )  # fmt: skip
            return found

        def of_input(rows: slice) -> Tensor:
            # The gradient of the input depends on the input's shape alone.
            (dx, *_) = gradients(rows, recipe.empty(rows), [True, False])
            return cast(Tensor, dx).to(recipe.dtype)

        d_first: Tensor | None = None
        if for_first:
            for rows in recipe.parts:
                dW = gradients(rows, recipe.read(rows, tensors), [False, True])[1]
                d_first = add_part(d_first, dW)
        if not for_x:
            return None, None, d_first
        like = replace(recipe, cheap=False)
        return None, by_parts_or_lazy(of_input, like, ctx.next_functions[0][0]), d_first
