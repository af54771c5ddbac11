"""Gradient checkpointing of a plain network: the baseline that a claim of little memory has to
meet."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Segment", "checkpointed", "segment_sizes"]


class Segment(nn.Sequential):
    """Modules of which only the input is held; they run again when their gradient is asked for.

    Their batch norms take notice of a batch twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


def checkpointed(net: nn.Module, size: int) -> nn.Module:
    """A copy of ``net`` whose chains run as segments of ``size`` blocks each.

    A chain is ``net`` itself if it is an ``nn.Sequential``, else every ``nn.Sequential`` among its
    children. A block is an element with a weight matrix and those without that follow it:
    convolution, norm, activation, pooling; or a residual block. What leads to the output, the last
    block of all, stays as it is.
    """
    net = copy.deepcopy(net)
    if isinstance(net, nn.Sequential):
        blocks = _blocks(net)
        return nn.Sequential(*_join(blocks[:-1], size), *itertools.chain(*blocks[-1:]))
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential):
            net.set_submodule(name, nn.Sequential(*_join(_blocks(child), size)))
    return net


def segment_sizes(net: nn.Module) -> tuple[int, ...]:
    """The two segmentations to try: every block on its own, and the square root of the length of
    the longest chain."""
    chains = [net] if isinstance(net, nn.Sequential) else list(net.children())
    longest = max((len(_blocks(c)) for c in chains if isinstance(c, nn.Sequential)), default=1)
    return tuple(dict.fromkeys((1, math.ceil(math.sqrt(longest)))))


def _blocks(chain: nn.Sequential) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = []
    for module in chain:
        if not blocks or any(p.ndim >= 2 for p in module.parameters()):
            blocks.append([])
        blocks[-1].append(module)
    return blocks


def _join(blocks: Sequence[Sequence[nn.Module]], size: int) -> list[Segment]:
    runs = [blocks[i : i + size] for i in range(0, len(blocks), size)]
    return [Segment(*itertools.chain(*run)) for run in runs]
