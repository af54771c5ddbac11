"""The gradients of streaming local learning, from a pass that streams nothing.

The model runs once and keeps its whole graph. Every unit's loss is differentiated through that
graph to the parameters of the units within its horizon, and to no others. ``borders``: indices of
units that no gradient travels past. ``every_output``: units of several outputs are taught at each
of them, in place of the first alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

UnitLoss = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of the output, the output, the network's output, targets) -> a loss on it; a unit's loss
is the sum over its outputs"""


def gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    exits: Sequence[str],
    parameters: Sequence[Sequence[str]],
    loss: UnitLoss,
    horizon: int,
    borders: Sequence[int] = (),
    every_output: bool = False,
) -> dict[str, Tensor]:
    outputs: list[list[Tensor]] = []

    def record(module: nn.Module, args: object, output: object) -> None:
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        outputs.append(tensors if every_output else tensors[:1])

    handles = [model.get_submodule(path).register_forward_hook(record) for path in exits]
    z = model(x)
    for handle in handles:
        handle.remove()
    number = itertools.count()
    losses = [sum(loss(next(number), h, z, y) for h in of_unit) for of_unit in outputs]
    losses.append(F.cross_entropy(z, y))
    assert len(losses) == len(parameters)
    named = dict(model.named_parameters())
    total: dict[str, Tensor] = {}
    for i, unit_loss in enumerate(losses):
        for j in range(max(0, i - horizon, *(b for b in borders if b <= i)), i + 1):
            within = [n for n in parameters[j] if named[n].requires_grad]
            grads = torch.autograd.grad(
                unit_loss, [named[n] for n in within], retain_graph=True, allow_unused=True
            )
            for name, grad in zip(within, grads, strict=True):
                if grad is not None:
                    total[name] = total.get(name, torch.zeros_like(grad)) + grad
    return total


def pooled(h: Tensor, grid: int | None) -> Tensor:
    if h.ndim == 4 and grid is not None:
        h = F.adaptive_avg_pool2d(h, (min(grid, h.shape[2]), min(grid, h.shape[3])))
    return h.mean(1) if h.ndim == 3 else h.flatten(1)


def local_loss(feedback: Sequence[Tensor], grid: int | None, alpha: float) -> UnitLoss:
    """Cross-entropy of the unit's own logits ``B^T P(h)``, plus ``alpha`` similarity alignment."""

    def loss(i: int, h: Tensor, z: Tensor, y: Tensor) -> Tensor:
        own = F.cross_entropy(pooled(h, grid) @ feedback[i], y)
        if not alpha:
            return own
        rows = h.flatten(2) if h.ndim > 2 else h
        rows = rows.std(2, correction=0) if h.ndim == 4 else rows
        one_hot = torch.eye(z.shape[1], dtype=z.dtype)[y]
        return own + alpha * (_cosines(rows) - _cosines(one_hot)).square().mean()

    return loss


def _cosines(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    norms = rows.norm(dim=1)
    return (rows @ rows.T) / torch.outer(norms, norms)


def output_loss(feedback: Sequence[Tensor], grid: int | None) -> UnitLoss:
    """``<B e, P(h)>`` with ``e`` the gradient of the task loss at the network's output."""

    def loss(i: int, h: Tensor, z: Tensor, y: Tensor) -> Tensor:
        e = (z.softmax(1) - torch.eye(z.shape[1], dtype=z.dtype)[y]).detach() / len(y)
        return ((e @ feedback[i].T) * pooled(h, grid)).sum()

    return loss


def target_loss(feedback: Sequence[Tensor], grid: int | None) -> UnitLoss:
    """``<B (-y), P(h)>``, a mean over the batch."""

    def loss(i: int, h: Tensor, z: Tensor, y: Tensor) -> Tensor:
        e = -torch.eye(z.shape[1], dtype=z.dtype)[y] / len(y)
        return ((e @ feedback[i].T) * pooled(h, grid)).sum()

    return loss
