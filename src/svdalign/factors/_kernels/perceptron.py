"""Two linear layers on tokens (B, ..., channels) and what is between them, of which only ``r``
channels are saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._lazy import LazyTensor, recipe_of
from ..._parts import parts_of
from .expand import expand_by_parts


class _Wide(LazyTensor):
    """The output of a first layer. ``times``: its product with a matrix, as a part of the same
    graph. A copy, such as a unit passes on to the next, has none."""

    times: Callable[[Tensor], Tensor] | None = None


def reduce_tokens(x: Tensor, V: Tensor) -> Tensor:
    """``x V``, (B, ..., C) to (B, ..., r). Where ``x`` is what :func:`expand_tokens` returned it is
    computed some samples at a time, and again in the backward pass."""
    if isinstance(x, _Wide) and x.times is not None:
        return x.times(V)
    return x @ V


def expand_tokens(tail: nn.Sequential, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``tail(z weight^T + bias)``, (B, ..., r) to (B, ..., N); lazy if it is larger than ``z``.
    ``tail``: activations without parameters."""
    parts = parts_of(z.movedim(-1, 1), len(weight))

    def run(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, tail(F.linear(z, weight, bias)))

    def samples(rows: slice, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return run(z[rows], weight.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def times(V: Tensor) -> Tensor:
        return expand_by_parts(lambda *layer: run(*layer) @ V, parts, z, weight, bias, V)

    if len(weight) <= z.shape[-1] or torch.compiler.is_compiling():
        return expand_by_parts(run, parts, z, weight, bias)
    tensors = [t.detach() for t in (z, weight)]
    if bias is not None:  # a parameter may be updated before the last reader comes: copy it
        tensors.append(bias.detach().clone())
    like = replace(recipe_of(z), tensors=tuple(tensors), shape=(*z.shape[:-1], len(weight)))
    like = replace(like, parts=parts, samples=samples)
    wide = expand_by_parts(run, parts, z, weight, bias, unwritten=lambda: _Wide(like))
    cast(_Wide, wide).times = times
    return wide
