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
from .._tracing import temporary, untraced
from ..factors.registry import kind_of, own_matrices
from ..factors.stiefel import qr_retract
from ._registry import register
from .bp import BP


@register
@dataclass(frozen=True)
class FA(BP):
    """Backpropagation whose errors go back through fixed random weights of the shape and scale of
    the forward weights; for a factored layer through random factors. The whole graph is kept, as
    for BP.

    This holds for all registered layer types, factored or dense: linear layers, convolutions,
    transposed convolutions. Through other modules with weights (LSTM, attention) errors go back as
    in backpropagation, and a UserWarning names these modules.

    Source: Lillicrap, Cownden, Tweed and Akerman, *Random synaptic feedback weights support error
    backpropagation for deep learning* (2016).
    """

    name: str = "fa"

    needs_affine_layers: ClassVar[bool] = True

    def mirror(self, layer: nn.Module, generator: torch.Generator) -> nn.Module:
        """A layer of the shape of ``layer``, for errors to go back through."""
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
            if kind is not None and any(p.is_complex() for p in layer.parameters()):
                raise ValueError(
                    f"rule {self.name!r} has real feedback weights, but those of {name!r} are "
                    "complex"
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
        hooks = []
        for layer, mirror in mirrored(model, transport):
            detach, bridge = untraced(_detach_input), untraced(_Bridge(mirror))
            hooks.append(layer.register_forward_pre_hook(detach, with_kwargs=True))
            hooks.append(layer.register_forward_hook(bridge, with_kwargs=True))
        with temporary(hooks):
            yield


def mirrored(model: nn.Module, transport: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers of ``model`` that have a mirror in ``transport``, each with its mirror."""
    mirrors = dict(transport.named_children())
    for name, layer in model.named_modules():
        if (mirror := mirrors.get(_key(name))) is not None:
            yield layer, mirror


def _key(name: str) -> str:
    # An nn.ModuleDict takes no name with a dot, no "" (the model itself), and no "keys".
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
    """Whether errors may go back through weights of ``module`` itself."""
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
    # The forward hook needs the input with its graph.
    layer._fa_input = x
    return args, kwargs


class _Bridge:
    """A forward hook that connects a layer's output to its detached input through ``mirror``."""

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
    """Forward it returns ``y``. Backward it gives the error unchanged to ``y``, and through
    ``mirror``, which computes in ``dtype``, to ``x``."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, mirror: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        ctx.mirror, ctx.mirror_dtype = mirror, dtype
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device
        return y.detach()  # ``y`` itself would become a view, which cannot be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only with create_graph=True
            raise ValueError(
                "rules that send errors back through other weights have no second derivatives, "
                "which forward or the loss asks for by create_graph=True"
            )
        with torch.enable_grad():
            # The mirror is affine, so its vector-Jacobian product does not depend on x. It works
            # in the weights' precision also where autocast has lowered that of the error.
            x = torch.zeros(ctx.shape, dtype=ctx.mirror_dtype, device=ctx.device).requires_grad_()
            (carried,) = torch.autograd.grad(ctx.mirror(x), x, grad.to(ctx.mirror_dtype))
        return grad, carried.to(ctx.dtype), None, None
