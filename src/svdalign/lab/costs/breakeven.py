"""The break-even rank: up to it a factored layer costs no more than its dense form, by
multiply-accumulates (MACs) or by time."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._tracing import watching
from ...factors import FactoredLayer, factored_layers
from ...factors.layers import absolute_rank
from .latency import alternate

_SHARES = (
    1 / 16,
    1 / 8,
    1 / 4,
    3 / 8,
    1 / 2,
    5 / 8,
    3 / 4,
    7 / 8,
    1.0,
)  #: of full rank: ranks timed


class Call(NamedTuple):
    """How a network calls a layer: shapes of input and output, and whether the input needs a
    gradient."""

    layer: FactoredLayer
    x: tuple[int, ...]
    y: tuple[int, ...]
    input_gradient: bool


def factored_calls(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """The first call of each factored layer, by name, in a forward pass of ``model`` on ``x``."""
    calls: dict[str, Call] = {}

    def note(name: str, layer: FactoredLayer, args: tuple[Tensor], y: Tensor) -> None:
        (x,) = args
        calls.setdefault(name, Call(layer, tuple(x.shape), tuple(y.shape), x.requires_grad))

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in factored_layers(model).items()
    ]
    with watching(handles):
        model(x)
    return calls


def macs_break_even(layer: FactoredLayer, x: Sequence[int], y: Sequence[int]) -> int:
    """The largest rank at which ``layer`` takes no more MACs than its dense form; 0 if none does.

    ``x`` and ``y`` are the shapes of its input and output. Counted as in :func:`inference_macs`.
    """
    of_direction, of_dense = layer.macs(x, y)
    return min(layer.full_rank, of_dense // of_direction)


def time_ratios(
    layer: FactoredLayer, x: Tensor, *, training: bool, seconds: float = math.inf
) -> dict[int, float]:
    """Ratio of the time of ``layer`` to that of its dense form on the input ``x``, by rank, for
    some ranks up to full.

    Timed is a forward pass without gradients or, with ``training``, one with its backward pass: to
    the parameters, and to ``x`` if that requires a gradient. All ranks and the dense layer run in
    turns, see :func:`alternate`, which also takes ``seconds``. Only the shape of ``layer`` matters:
    it may be on the meta device.
    """
    ranks = sorted({absolute_rank(share, layer.full_rank) for share in _SHARES})
    layers = {"dense": layer.dense(), **{str(rank): _of_rank(layer, rank) for rank in ranks}}
    layers = {name: _with_numbers(module, x) for name, module in layers.items()}
    with torch.no_grad():
        gradient = torch.randn_like(layers["dense"](x)) if training else None
    work = {name: partial(_run, module, x, gradient) for name, module in layers.items()}
    times = alternate(work, rounds=15, warmup=1, seconds=seconds)
    return {rank: times[str(rank)].ratio(times["dense"]) for rank in ranks}


def time_break_even(ratios: Mapping[int, float]) -> int | None:
    """The largest rank that takes at most the time of the dense layer, by linear interpolation
    between the measured ``ratios``; None if every ratio is above 1."""
    within = max((rank for rank, ratio in ratios.items() if ratio <= 1), default=None)
    above = min((rank for rank in ratios if within is not None and rank > within), default=None)
    if within is None or above is None:
        return within
    rise = (ratios[above] - ratios[within]) / (above - within)
    return within + math.floor((1 - ratios[within]) / rise)


def _of_rank(layer: FactoredLayer, rank: int) -> FactoredLayer:
    layer = copy.deepcopy(layer)
    U, V = (factor.new_empty(len(factor), rank) for factor in (layer.U, layer.V))
    layer.set_factors(U, layer.s.new_empty(rank), V)
    return layer


def _with_numbers(layer: nn.Module, x: Tensor) -> nn.Module:
    """``layer`` on the device of ``x``, its kernels laid out as ``x`` is."""
    layer = layer.to_empty(device=x.device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer


def _run(layer: nn.Module, x: Tensor, gradient: Tensor | None) -> None:
    """A forward pass; with the ``gradient`` of its output, a backward pass too."""
    with torch.set_grad_enabled(gradient is not None):
        y = layer(x)
    if gradient is not None:
        leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
        torch.autograd.grad(y, leaves, gradient)
