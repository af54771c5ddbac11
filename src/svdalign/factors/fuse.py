"""Rewrites a model so that its factored layers are fused with what follows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .._copying import copied
from .._tracing import followers, substitute
from ._choice import choose_kernels
from .fused import FusedConv2d, Kernel
from .fused_linear import FusedLinear
from .layers import SVDConv2d, SVDLinear

#: Modules that treat every number by itself, draw no random numbers and keep no state.
_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
)  # fmt: skip
#: Modules that treat every sample by itself, likewise.
_PER_SAMPLE = (*_POINTWISE, nn.PReLU, nn.MaxPool2d, nn.AvgPool2d, nn.GroupNorm)


def fuse(
    model: nn.Module, example: Tensor | None = None, *, memory: int | None = None
) -> nn.Module:
    """A copy of ``model`` in which factored layers are fused with the modules after them.

    A convolution takes in a batch norm (in the channel scheme), then activations, pooling and group
    norms: those that are modules, are called once by the traced ``forward``, and are all that reads
    the output before them. A linear layer takes in activations that a second one alone reads, as in
    a transformer's perceptron. An ``nn.Identity`` is left in the place of each. The function stays
    the same to rounding, in training and in evaluation, and a training step takes less memory: see
    :class:`FusedConv2d` and :class:`FusedLinear`. Parameters keep their values; those of a norm get
    the name of its convolution: ``CONV.tail.0.weight``.

    Pooling that can shrink a map more than a 2 x 2 pooling does is not taken in, so that units of
    single layers end where they do without fusing. A unit that would end between modules that were
    taken in (a block whose pooling stands outside it) ends after them.

    Call this before you make a learner or an optimizer. Where nothing can be fused the copy is like
    ``model``, and a UserWarning says why.

    Args:
        model: what :func:`factorize` returned. It is left as it is.
        example: a batch of inputs (B, C, H, W) as it comes in training. With it each fused
            convolution is timed on the maps that it gets, once for each shape, and then uses its
            fastest kernel, which computes the same function. On small maps and at high ranks that
            saves time and takes more memory. The choice depends on the machine: for a run that can
            be repeated bit by bit leave ``example`` out, or set each layer's ``kernel``.
        memory: the most bytes that all layers together may save for their backward passes beyond
            what fused kernels save, a whole number; None for any number. Needs an ``example``.

    Raises:
        TypeError: for a ``memory`` that is neither.
        ValueError: for a negative ``memory`` or one without an ``example``; for a model whose
            ``forward`` cannot be traced (control flow that depends on the data).
    """
    fused = fuse_where_possible(model)
    if not any(isinstance(module, FusedConv2d | FusedLinear) for module in fused.modules()):
        warnings.warn(f"nothing was fused: {_why_not(fused)}", stacklevel=2)
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
        raise TypeError(f"memory must be a whole number of bytes or None, got {memory!r}")
    if memory is not None and (example is None or memory < 0):
        raise ValueError(
            f"memory must be at least 0 and goes with an example, got {memory} and "
            f"{'no example' if example is None else 'an example'}"
        )
    if example is not None:
        use_fastest_kernels(fused, example, memory)
    return fused


def use_fastest_kernels(model: nn.Module, example: Tensor, memory: int | None = None) -> None:
    """Time the kernels of each fused convolution of ``model``, see :func:`fuse`."""
    trial = copied(model)  # whose statistics the pass may change
    set_kernels(model, choose_kernels(trial, lambda: trial(example), memory))


def set_kernels(model: nn.Module, kernels: Mapping[str, Kernel]) -> None:
    """Have the fused convolutions of ``model`` use these kernels, by the layers' names."""
    for name, kernel in kernels.items():
        cast(FusedConv2d, model.get_submodule(name)).kernel = kernel


def _why_not(model: nn.Module) -> str:
    layers = [m for m in model.modules() if isinstance(m, SVDConv2d)]
    if not layers:
        return (
            "model has no factored convolution, and no two factored linear layers with an "
            "activation between them; svdalign.factorize makes them"
        )
    normed = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    if normed and any(layer.scheme == "spatial" for layer in layers):
        return (
            "in the spatial scheme a convolution takes in no batch norm; "
            'svdalign.factorize(model, scheme="channel") makes convolutions that do'
        )
    return (
        "no factored convolution is followed, and by that alone, by a module that it can take in, "
        "such as a batch norm, an activation or a small pooling"
    )


def fuse_where_possible(model: nn.Module) -> nn.Module:
    """:func:`fuse` without a warning where there is nothing to fuse."""
    model = copied(model)
    leaf = (SVDConv2d, SVDLinear)
    try:
        follows = followers(model, leaf)
    except Exception as error:  # tracing runs the user's own code on stand-ins
        raise ValueError(
            f"model cannot be fused, as its forward cannot be traced: {error}"
        ) from error
    replaced: dict[nn.Module, nn.Module] = {}
    readers: dict[FusedConv2d, nn.Module] = {}  # what reads the output, or the tail's own end
    seconds: list[SVDLinear] = []  # that read what another linear layer has taken in
    for path in follows:
        layer = model.get_submodule(path)
        if type(layer) is SVDLinear:
            tail, then = _perceptron(model, follows, path)
            if tail and then is not None:
                replaced |= {layer: FusedLinear(layer, tail)}
                replaced |= {module: nn.Identity() for module in tail}
                seconds.append(then)
        if type(layer) is not SVDConv2d:
            continue
        tail = []
        reader = ""
        for reader in _chain(follows, path):
            module = model.get_submodule(reader)
            norm = type(module) is nn.BatchNorm2d and not tail and layer.scheme == "channel"
            if not (norm or _can_be_taken_in(module)):
                break
            tail.append(module)
        if tail:
            replaced |= {layer: (fused := FusedConv2d(layer, tail))}
            replaced |= {module: nn.Identity() for module in tail}
            readers[fused] = model.get_submodule(reader)
    for fused, module in readers.items():
        fused.read_by_parts = isinstance(replaced.get(module), FusedConv2d)
    for second in seconds:
        replaced.setdefault(second, FusedLinear(second, []))
    substitute(model, replaced, leaf)
    return model


def _perceptron(
    model: nn.Module, follows: dict[str, str], path: str
) -> tuple[list[nn.Module], SVDLinear | None]:
    """The activations after the linear layer at ``path``, and the linear layer that reads them."""
    tail: list[nn.Module] = []
    for reader in _chain(follows, path):
        module = model.get_submodule(reader)
        if type(module) is SVDLinear:
            return tail, module
        if type(module) not in _POINTWISE and not (type(module) is nn.Dropout and not module.p):
            break
        tail.append(module)
    return tail, None


def _can_be_taken_in(module: nn.Module) -> bool:
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        return False
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and not _shrinks_little(module):
        return False
    return type(module) in _PER_SAMPLE


def _shrinks_little(pool: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    """Whether at least ``n // 2`` of the ``n`` positions along an axis are left: after such pooling
    a unit goes on (:mod:`svdalign.engine.cuts`)."""
    by_axis = (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    return all(
        stride <= 2 and dilation * (kernel - 1) <= 2 * padding + 1
        for kernel, stride, padding, dilation in zip(*map(_pair, by_axis), strict=True)
    )


def _chain(follows: dict[str, str], path: str) -> Iterator[str]:
    while path in follows:
        path = follows[path]
        yield path
