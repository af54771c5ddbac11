"""Feedback alignment: errors travel layer by layer, through fixed random weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .._copying import with_own_weight
from ..factors.registry import kind_of, own_matrices
from ..factors.stiefel import qr_retract
from ._registry import register
from .bp import BP

__all__ = ["FA", "mirrored"]


@register
@dataclass(frozen=True)
class FA(BP):
    """Backpropagation whose errors go back through fixed random weights of the forward weights'
    shape and scale. A factored layer gets random factors. It holds the whole graph, as BP does.

    Linear layers and convolutions, factored or dense, send errors back so, transposed convolutions
    too. Through other modules with weights (LSTM, attention) errors go back as in backpropagation,
    and a UserWarning names them.

    Source: Lillicrap, Cownden, Tweed and Akerman, *Random synaptic feedback weights support error
    backpropagation for deep learning* (2016).
    """

    name: str = "fa"

    needs_affine_layers: ClassVar[bool] = True

    def mirror(self, layer: nn.Module, generator: torch.Generator) -> nn.Module:
        """A linear map of ``layer``'s shape, for errors to go back through."""
        mirror = with_own_weight(layer)
        _randomise(mirror, generator)
        return mirror

    def transport(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        mirrors: dict[str, nn.Module] = {}
        not_mirrored: list[str] = []
        for name, layer in model.named_modules():
            kind = kind_of(layer)
            if kind is not None and not kind.affine:
                raise ValueError(
                    f"rule {self.name!r} sends errors back through each layer by itself, but "
                    f"{name!r} is fused with what follows it: leave svdalign.fuse out"
                )
            if kind is not None:
                mirrors[name] = self.mirror(layer, generator).requires_grad_(False)
            elif _carries_errors(layer) and not any(name.startswith(f"{n}.") for n in mirrors):
                not_mirrored.append(f"{name!r} ({type(layer).__name__})")
        if not_mirrored:
            warnings.warn(
                f"rule {self.name!r} sends errors back as backpropagation does, through the "
                f"forward weights, in {', '.join(not_mirrored)}: it has feedback weights for "
                "linear layers and convolutions alone",
                stacklevel=3,
            )
        return nn.ModuleDict({_key(name): mirror for name, mirror in mirrors.items()})

    @contextlib.contextmanager
    def transporting(self, model: nn.Module, transport: nn.Module) -> Iterator[None]:
        handles = []
        for layer, mirror in mirrored(model, transport):
            handles.append(layer.register_forward_pre_hook(_detach_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(_Bridge(mirror), with_kwargs=True))
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
        if getattr(layer, "orthonormal", False):
            for X in (layer.get_parameter("U"), layer.get_parameter("V")):
                X.copy_(qr_retract(normal(X)))
        else:
            weight = layer.get_parameter("weight")
            weight.copy_(normal(weight) * weight.square().mean().sqrt())


def _carries_errors(module: nn.Module) -> bool:
    """Whether ``module`` may send errors back through weights of its own."""
    return bool(own_matrices(module)) and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


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

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = layer.__dict__.pop("_fa_input")
        if not x.requires_grad:
            return output

        def mirror(x: Tensor) -> Tensor:
            if args:
                return cast(Tensor, self.mirror(x, *args[1:], **kwargs))
            return cast(Tensor, self.mirror(**{**kwargs, next(iter(kwargs)): x}))

        dtype = next(self.mirror.parameters()).dtype
        return cast(Tensor, _Transport.apply(output, x, mirror, dtype))  # type: ignore[no-untyped-call]


class _Transport(torch.autograd.Function):
    """``y`` forwards; backwards the error as it is to ``y``, and through ``mirror``, which computes
    in ``dtype``, to ``x``."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, mirror: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        ctx.mirror, ctx.mirror_dtype = mirror, dtype
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device
        return y.detach()  # as it is it would be a view, not to be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            # The mirror is affine, so its vector-Jacobian product does not depend on where.
            # It keeps the weights' precision also where autocast has lowered the error's.
            x = torch.zeros(ctx.shape, dtype=ctx.mirror_dtype, device=ctx.device).requires_grad_()
            (carried,) = torch.autograd.grad(ctx.mirror(x), x, grad.to(ctx.mirror_dtype))
        return grad, carried.to(ctx.dtype), None, None
