"""The fastest kernel for each fused convolution: measured once for each setting, and remembered."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._operations import saving_as_usual
from .._parts import memory_format
from .._tracing import watching
from .fused import KERNELS, FusedConv2d, Kernel

_GAIN = 0.05  #: another kernel is taken if it is faster by this share: less is noise
_RUNS = 5  #: the fastest counts, as other programs on the machine can only make a run longer


@dataclass(frozen=True)
class Cost:
    """The cost of a layer's forward and backward pass. ``saved``: bytes saved between the two."""

    seconds: float
    saved: int


_known: dict[Hashable, dict[Kernel, Cost]] = {}


@dataclass(frozen=True)
class _Offer:
    layer: FusedConv2d
    kernel: Kernel
    seconds: float  # gained
    saved: int  # bytes more


def choose_kernels(
    model: nn.Module, run: Callable[[], object], memory: int | None = None
) -> dict[str, Kernel]:
    """Give every fused convolution of ``model`` its fastest kernel for the inputs that it gets in
    ``run``, a forward pass. Returns the kernels by the layers' names.

    ``memory``: the bytes that all layers together may save beyond what fused kernels save, None for
    any number. They go to the layers that gain the most time for each byte.
    """
    offers = []
    for layer, x in _inputs(model, run).items():
        costs = _costs(layer, x)
        layer.kernel, fused = "fused", costs["fused"]
        best = min(costs, key=lambda kernel: costs[kernel].seconds)
        gained = fused.seconds - costs[best].seconds
        if gained > _GAIN * fused.seconds:
            offers.append(_Offer(layer, best, gained, max(0, costs[best].saved - fused.saved)))
    left = math.inf if memory is None else memory
    for offer in sorted(offers, key=lambda o: o.seconds / (1 + o.saved), reverse=True):
        if offer.saved <= left:
            offer.layer.kernel = offer.kernel
            left -= offer.saved
    return kernels_of(model)


def kernels_of(model: nn.Module) -> dict[str, Kernel]:
    """The kernel of each fused convolution, by the layers' names."""
    return {name: layer.kernel for name, layer in _fused(model)}


def _fused(model: nn.Module) -> Iterator[tuple[str, FusedConv2d]]:
    for name, module in model.named_modules():
        if isinstance(module, FusedConv2d):
            yield name, module


def _inputs(model: nn.Module, run: Callable[[], object]) -> dict[FusedConv2d, Tensor]:
    """Empty tensors like the inputs that the fused convolutions get in ``run``."""
    found: dict[FusedConv2d, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, FusedConv2d)
        (x,) = args
        found[layer] = torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)
        )

    hooks = [layer.register_forward_pre_hook(note) for _, layer in _fused(model)]
    with watching(hooks), torch.no_grad():
        run()
    return found


def _costs(layer: FusedConv2d, x: Tensor) -> dict[Kernel, Cost]:
    key = (
        tuple(x.shape), x.dtype, x.device, memory_format(x), torch.get_num_threads(), layer.rank,
        layer.scheme, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, repr(layer.tail), torch.is_autocast_enabled(x.device.type),
    )  # fmt: skip
    if key not in _known:
        trial = copy.deepcopy(layer).train()
        x = torch.randn_like(x).requires_grad_()
        _known[key] = {kernel: _cost(trial, kernel, x) for kernel in KERNELS}
    return _known[key]


def _cost(layer: FusedConv2d, kernel: Kernel, x: Tensor) -> Cost:
    layer.kernel = kernel
    saved: dict[int, int] = {}

    def note(t: Tensor) -> None:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()

    with saving_as_usual(note):
        out = layer(x)
    grad = torch.randn_like(out)
    del out
    seconds = []
    for _ in range(_RUNS):
        _wait(x)
        start = time.perf_counter()
        layer(x).backward(grad)
        _wait(x)
        seconds.append(time.perf_counter() - start)
    return Cost(min(seconds), sum(saved.values()))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
