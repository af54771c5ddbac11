"""Tensors that are computed when they are read, some samples at a time.

A map of N channels that is expanded from one of r channels need not be stored: the code that reads
it computes the samples that it works on from the smaller map. The same holds for the gradient of
such a map. A :class:`LazyTensor` stands for such a tensor. Code that knows about it reads some
samples at a time (:func:`read`); any other operation gets the whole tensor, computed on demand, so
that results are always right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._autocast import outside_autocast
from ._parts import by_parts, memory_format


@dataclass(frozen=True)
class Recipe:
    """How to compute samples of a tensor of ``shape`` (B, ...) from smaller ``tensors``.

    ``samples(rows, *tensors)`` computes the samples ``rows``; None where ``tensors`` is the tensor
    itself. ``parts``: the samples to compute at a time. ``cheap``: computing them costs far less
    than a convolution. ``latest``: the samples computed last, for as long as they are in use, so
    that two readers of the same part share them.
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    format: torch.memory_format
    parts: list[slice]
    samples: Callable[..., Tensor] | None = None
    cheap: bool = True
    latest: dict[tuple[int, int], weakref.ref[Tensor]] = field(default_factory=dict)

    def read(self, rows: slice, tensors: Sequence[Tensor]) -> Tensor:
        """The samples ``rows``, which must not be changed. ``tensors``: as autograd has saved
        them."""
        if self.samples is None:
            return tensors[0][rows]
        key = (rows.start, rows.stop)
        known = self.latest[key]() if key in self.latest else None
        if known is not None:
            return known
        with outside_autocast():
            made = self.samples(rows, *tensors)
        self.latest.clear()
        self.latest[key] = weakref.ref(made)
        return made

    def without_tensors(self) -> Recipe:
        """The recipe without its ``tensors``, for code that has autograd save these."""
        return replace(self, tensors=())

    def empty(self, rows: slice) -> Tensor:
        """A new tensor like the samples ``rows``, without values."""
        shape = (rows.stop - rows.start, *self.shape[1:])
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=self.format)


class LazyTensor(Tensor):
    """A tensor (B, ...) that is computed by a :class:`Recipe` and has no memory of its own.

    An operation that does not know this class gets the whole tensor, which is then kept. A sum with
    a tensor of the same shape is lazy again, and so is its product with the derivative of an
    activation function.
    """

    recipe: Recipe
    whole: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, recipe: Recipe) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, recipe.shape, _strides(recipe.shape, recipe.format),
            dtype=recipe.dtype, device=recipe.device, storage_size=0,
        )  # fmt: skip
        made.recipe, made.whole = recipe, None
        return made

    def compute(self) -> Tensor:
        """The whole tensor."""
        if self.whole is None:
            recipe = self.recipe
            self.whole = by_parts(lambda rows: recipe.read(rows, recipe.tensors), recipe.parts)
            if len(recipe.parts) == 1:  # which another reader may share
                self.whole = self.whole.clone()
        return self.whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ALIASES and args[0].whole is None and args[1:] in ((), ([*args[0].shape],)):
            return cls(args[0].recipe)
        if func in _SUMS and not kwargs and _alike(*args):
            if func is torch.ops.aten.add.Tensor:
                return _sum(*args)
            if not isinstance(args[0], LazyTensor):
                return _add_to(*args)
        if func in _DERIVATIVES.values() and _alike(*args[:2]) and _better_lazy(recipe_of(args[0])):
            return _through(func, *args, **kwargs)
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.compute, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def _strides(shape: tuple[int, ...], format: torch.memory_format) -> tuple[int, ...]:
    """The strides of a tensor of ``shape`` (B, C, ...), contiguous or channels last."""
    order = list(range(len(shape)))
    if format == torch.channels_last:
        order = [0, 2, 3, 1]
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


#: Operations that return the same tensor: autograd makes such views, of the same shape.
_ALIASES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
)
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


#: By the name of autograd's node: the operation by which the gradient goes back through an
#: activation function. It takes the gradient, a tensor of the same shape, and settings.
_DERIVATIVES = {
    "ReluBackward0": torch.ops.aten.threshold_backward.default,
    "LeakyReluBackward0": torch.ops.aten.leaky_relu_backward.default,
    "HardtanhBackward0": torch.ops.aten.hardtanh_backward.default,
    "HardswishBackward0": torch.ops.aten.hardswish_backward.default,
    "GeluBackward0": torch.ops.aten.gelu_backward.default,
    "SiluBackward0": torch.ops.aten.silu_backward.default,
}


def _alike(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _sum(a: Tensor, b: Tensor) -> LazyTensor:
    lazy = [recipe_of(t) for t in (a, b) if isinstance(t, LazyTensor)]
    recipe = min(lazy, key=lambda found: found.parts[0].stop)  # parts that fit both
    return LazyTensor(
        replace(
            recipe,
            tensors=(),
            samples=lambda rows: read(a, rows) + read(b, rows),
            cheap=recipe_of(a).cheap and recipe_of(b).cheap,
            latest={},
        )
    )


def _better_lazy(gradient: Recipe) -> bool:
    """Whether to keep a gradient lazy through an activation function, on whose other side it may be
    read more than once: it has several parts, and they are cheap to compute."""
    return gradient.cheap and len(gradient.parts) > 1


def _through(func: Any, grad: LazyTensor, at: Tensor, *settings: Any, **named: Any) -> LazyTensor:
    def samples(rows: slice) -> Tensor:
        part: Tensor = func(read(grad, rows), read(at, rows), *settings, **named)
        return part

    return LazyTensor(replace(recipe_of(grad), tensors=(), samples=samples, latest={}))


def _add_to(a: Tensor, b: LazyTensor) -> Tensor:
    for rows in recipe_of(b).parts:
        a[rows].add_(read(b, rows))
    return a


def recipe_of(t: Tensor) -> Recipe:
    """How to compute ``t`` (B, ...) again: what a backward pass that needs ``t`` has to save."""
    if isinstance(t, LazyTensor):
        if t.whole is None:
            return t.recipe
        t = t.whole
    return Recipe((t,), tuple(t.shape), t.dtype, t.device, memory_format(t), [slice(0, len(t))])


def read(t: Tensor, rows: slice) -> Tensor:
    """The samples ``rows`` of ``t``, which must not be changed."""
    recipe = recipe_of(t)
    return recipe.read(rows, recipe.tensors)


def reads_by_parts(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Mark a function whose backward pass takes lazy gradients, see :func:`by_parts_or_lazy`."""
    function.takes_lazy = True  # type: ignore[attr-defined]
    return function


def by_parts_or_lazy(run: Callable[[slice], Tensor], like: Recipe, node: Any) -> Tensor:
    """A gradient of the shape and dtype of ``like``; ``run`` computes some of its samples. It is
    lazy if ``node``, the node of the autograd graph that reads it, is marked by
    :func:`reads_by_parts`, or if it is that of an activation function, so that a gradient of
    several parts is not written on both sides of it."""
    takes_lazy = getattr(getattr(node, "_forward_cls", None), "takes_lazy", False)
    if takes_lazy or (_better_lazy(like) and node.name() in _DERIVATIVES):
        return LazyTensor(replace(like, tensors=(), samples=run, latest={}))
    return by_parts(run, like.parts)
