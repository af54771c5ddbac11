"""Feedback alignment: errors travel layer by layer, through fixed random weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import FactoredLayer, FusedConv2d
from ..factors.stiefel import qr_retract
from ._registry import register
from .bp import BP

__all__ = ["FA", "mirrored"]


@register
@dataclass(frozen=True)
class FA(BP):
    """Backpropagation whose errors go back through fixed random weights of the forward weights'
    shape and scale. A factored layer gets random factors. It holds the whole graph, as BP does.

    Source: Lillicrap, Cownden, Tweed and Akerman, *Random synaptic feedback weights support error
    backpropagation for deep learning* (2016).
    """

    name: str = "fa"

    def mirror(self, layer: nn.Module, generator: torch.Generator) -> nn.Module:
        """A linear map of ``layer``'s shape, for errors to go back through."""
        mirror = copy.deepcopy(layer)
        _randomise(mirror, generator)
        return mirror

    def transport(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        if fused := [name for name, m in model.named_modules() if isinstance(m, FusedConv2d)]:
            raise ValueError(
                f"rule {self.name!r} sends errors back through each layer by itself, but model has "
                f"fused convolutions ({', '.join(fused)}): leave svdalign.fuse out"
            )
        kinds = (FactoredLayer, nn.Linear, nn.Conv2d)
        return nn.ModuleDict(
            {
                _key(name): self.mirror(layer, generator).requires_grad_(False)
                for name, layer in model.named_modules()
                if isinstance(layer, kinds)
            }
        )

    @contextlib.contextmanager
    def transporting(self, model: nn.Module, transport: nn.Module) -> Iterator[None]:
        handles = []
        for layer, mirror in mirrored(model, transport):
            handles.append(layer.register_forward_pre_hook(_detach_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(_Bridge(mirror)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def mirrored(model: nn.Module, transport: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers through which errors travel backwards, each with its mirror."""
    mirrors = dict(transport.named_children())
    for name, layer in model.named_modules():
        if (mirror := mirrors.get(_key(name))) is not None:
            yield layer, mirror


def _key(name: str) -> str:
    # An nn.ModuleDict takes no dots, nor "" (the model itself), nor "keys" and the like.
    return "/" + name.replace(".", "/")


def _randomise(layer: nn.Module, generator: torch.Generator) -> None:
    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        if isinstance(layer, FactoredLayer):
            layer.set_factors(qr_retract(normal(layer.U)), layer.s, qr_retract(normal(layer.V)))
        else:
            weight = layer.get_parameter("weight")
            weight.copy_(normal(weight) * weight.std())


def _detach_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        x = args[0]
        args = (x.detach(), *args[1:])
    else:
        name, x = next(iter(kwargs.items()))
        kwargs = {**kwargs, name: x.detach()}
    # The input with its graph waits here for the forward hook, which bridges it to the output.
    layer._fa_input = x
    return args, kwargs


class _Bridge:
    """Forward hook that joins a layer's output to its detached input through ``mirror``."""

    def __init__(self, mirror: nn.Module) -> None:
        self.mirror = mirror

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = layer.__dict__.pop("_fa_input")
        return _Transport.apply(output, x, self.mirror) if x.requires_grad else output  # type: ignore[no-untyped-call]


class _Transport(torch.autograd.Function):
    """``y`` forwards; backwards the error as it is to ``y``, and through ``mirror`` to ``x``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, mirror: nn.Module) -> Tensor:
        ctx.mirror, ctx.shape, ctx.dtype, ctx.device = mirror, x.shape, x.dtype, x.device
        return y.detach()  # as it is it would be a view, not to be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.enable_grad():
            # The mirror is affine, so its vector-Jacobian product does not depend on where.
            # It keeps the weights' precision also where autocast has lowered the error's.
            dtype = next(ctx.mirror.parameters()).dtype
            x = torch.zeros(ctx.shape, dtype=dtype, device=ctx.device).requires_grad_()
            (carried,) = torch.autograd.grad(ctx.mirror(x), x, grad.to(dtype))
        return grad, carried.to(ctx.dtype), None
