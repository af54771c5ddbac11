"""The second convolution and what follows it, of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..._autocast import present_autocast
from ..._lazy import LazyTensor, read, reads_by_parts
from ..._parts import by_parts, parts_of
from ..layers import SVDConv2d
from ._gradients import gradients_by_parts, gradients_of, wanted_gradients
from .expand_relu import ExpandReLU


def expand(
    layer: SVDConv2d,
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    tail: list[nn.Module],
    *,
    lazy: bool,
) -> Tensor:
    """The second convolution of ``layer``, of ``z`` (B, r, h, w) with the kernel ``second``, and
    the modules of ``tail``, which treat every sample by itself. ``lazy``: what reads the result
    reads it by parts, so that it need not be written."""
    if not tail:
        return layer.expand(z, second, bias)
    kinds = [type(module) for module in tail]
    even = not isinstance(layer.paddings()[1], str)
    if even and kinds in ([nn.ReLU], [nn.ReLU, nn.MaxPool2d]):
        pool = tail[1] if len(tail) > 1 else None
        return cast(Tensor, ExpandReLU.apply(layer, pool, lazy, z, second, bias))  # type: ignore[no-untyped-call]
    rest = nn.Sequential(*tail)

    def run(z: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, rest(layer.expand(z, second, bias)))

    return expand_by_parts(run, parts_of(z, len(second)), z, second, bias, *rest.parameters())


def expand_by_parts(
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    parts: list[slice],
    z: Tensor,
    second: Tensor,
    bias: Tensor | None,
    *parameters: Tensor,
    unwritten: Callable[[], LazyTensor] | None = None,
) -> Tensor:
    """``run(z, second, bias)``, which treats every sample by itself, for ``parts`` of the samples.
    Only ``z`` and the weights are saved; everything else is computed again in the backward pass.

    ``parameters``: what else ``run`` reads and gradients are for. ``unwritten``: makes a lazy
    tensor of that value, to be returned in its place.
    """
    return cast(Tensor, _Expand.apply(run, parts, unwritten, z, second, bias, *parameters))  # type: ignore[no-untyped-call]


@reads_by_parts
class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        parts: list[slice],
        unwritten: Callable[[], LazyTensor] | None,
        z: Tensor,
        second: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.run, ctx.parts, ctx.parameters = run, parts, parameters
        ctx.autocast = present_autocast()
        ctx.save_for_backward(z, second, bias)
        if unwritten is not None:
            return unwritten()
        return by_parts(lambda rows: run(z[rows], second, bias), parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, second, bias = ctx.saved_tensors
        z, second, bias = z.detach(), second.detach(), None if bias is None else bias.detach()
        weights = (second, bias, *ctx.parameters)
        wanted = wanted_gradients(ctx, ctx.needs_input_grad[3:])
        inputs = [w.requires_grad_() for w, want in zip(weights, wanted[1:], strict=True) if want]

        def run(rows: slice) -> list[Tensor | None]:
            part = z[rows].requires_grad_(wanted[0])
            with torch.enable_grad(), ctx.autocast():
                out = ctx.run(part, second, bias)
            return gradients_of(out, part, inputs, wanted, read(grad, rows))

        return None, None, None, *gradients_by_parts(run, ctx.parts, wanted)
