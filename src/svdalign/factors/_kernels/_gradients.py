"""What the backward passes of the kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._parts import by_parts


def gradients_by_parts(
    run: Callable[[slice], Iterable[Tensor | None]], parts: list[slice], wanted: list[bool]
) -> list[Tensor | None]:
    """The gradients that ``run`` finds for each of ``parts`` of the samples, put together: first
    that of a map, whose parts are joined, then those of weights, whose parts are summed. None for a
    gradient that is not wanted."""
    sums: list[Tensor | None] = [None] * len(wanted[1:])

    def one(rows: slice) -> Any:
        part, *found = run(rows)
        sums[:] = [add_part(a, b) for a, b in zip(sums, found, strict=True)]
        return part

    if wanted[0]:
        return [by_parts(one, parts), *sums]
    for rows in parts:
        one(rows)
    return [None, *sums]


def gradients_of(
    out: Tensor, part: Tensor, weights: list[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """By autograd, from the gradient ``grad`` in ``out``: that of ``part`` and those of
    ``weights``, which are the wanted ones alone; None for what is not wanted."""
    inputs = [part] * wanted[0] + weights
    found = iter(torch.autograd.grad(out, inputs, grad) if inputs else ())
    return [next(found) if want else None for want in wanted]


def to_compute_from(z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """What a lazy output keeps of what it is computed from. A parameter may be updated before the
    last reader comes, so the bias is copied."""
    kept = (z.detach(), weight.detach())
    return kept if bias is None else (*kept, bias.detach().clone())


def wanted_gradients(ctx: Any, needed: Sequence[bool]) -> list[bool]:
    """Which of the gradients that are ``needed`` in general the running backward pass asks for. It
    asks for no gradients of weights if it only carries a signal to earlier units."""
    nodes = [node for node, _ in ctx.next_functions]
    if len(nodes) < len(needed):  # there is no bias: for None autograd has no entry
        nodes.insert(2, None)
    return [n and _asked_for(node) for n, node in zip(needed, nodes, strict=True)]


def _asked_for(node: Any) -> bool:
    """Whether the running backward pass goes on to ``node``, which made a tensor that needs a
    gradient."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch's answer for a leaf that ``torch.autograd.grad`` is asked for
        return True


def add_part(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b`` in at least single precision, for sums over parts; None counts as zero."""
    if b is None:
        return a
    b = b if b.dtype == torch.float64 else b.float()
    return b if a is None else a.add_(b)


def positions(z: Tensor) -> Tensor:
    """The positions of a map (B, r, h, w) as rows (B h w, r); a view if it is channels last."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def as_map(positions: Tensor, h: int, w: int) -> Tensor:
    """The inverse of :func:`positions`."""
    return positions.reshape(-1, h, w, positions.shape[1]).permute(0, 3, 1, 2)
