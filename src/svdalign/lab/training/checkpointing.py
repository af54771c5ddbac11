"""Gradient checkpointing of a whole network: the baseline for every claim about memory."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..costs import pretending, step_memory


class CheckpointedSequential(nn.Sequential):
    """A chain of modules cut into segments of which only the inputs are saved.

    A segment runs a second time when its gradient is asked for, so batch norms see a batch twice.
    ``cuts``: the index at which each segment starts, and the end of the last one; what comes after
    it runs as usual. Without gradients it is a plain ``nn.Sequential``.
    """

    cuts: tuple[int, ...]

    @classmethod
    def of(cls, chain: nn.Sequential, cuts: tuple[int, ...]) -> CheckpointedSequential:
        """The modules of ``chain`` under the same names."""
        made = cls(OrderedDict(chain._modules))
        made.cuts = cuts
        return made

    def forward(self, x: Tensor) -> Tensor:
        """The chain's output."""
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        modules = list(self)
        for start, end in zip(self.cuts, self.cuts[1:], strict=False):
            x = checkpoint(nn.Sequential(*modules[start:end]), x, use_reentrant=False)
        for module in modules[self.cuts[-1] :]:
            x = module(x)
        return x


def checkpointed(net: nn.Module, size: int) -> nn.Module:
    """A copy of ``net`` whose chains run as segments of ``size`` blocks each.

    A chain is ``net`` itself if it is an ``nn.Sequential``, else every ``nn.Sequential`` among its
    children. A block is a module with a weight matrix and the modules without one that follow it
    (norm, activation, pooling), or a residual block. The last block of a ``net`` that is a chain
    itself leads to the output and stays as it is.
    """
    net = copy.deepcopy(net)
    if isinstance(net, nn.Sequential):
        *starts, end = _block_starts(net)
        return CheckpointedSequential.of(net, (*starts[::size], end))
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential):
            cuts = (*_block_starts(child)[::size], len(child))
            net.set_submodule(name, CheckpointedSequential.of(child, cuts))
    return net


def segment_sizes(net: nn.Module) -> tuple[int, ...]:
    """The sizes to try: one block, and the square root of the number of blocks in the longest
    chain."""
    chains = [net] if isinstance(net, nn.Sequential) else list(net.children())
    lengths = [len(_block_starts(c)) for c in chains if isinstance(c, nn.Sequential)]
    return tuple(dict.fromkeys((1, math.ceil(math.sqrt(max(lengths, default=1))))))


def smallest_checkpointed(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The copy whose training step on images of ``shape`` (N, C, H, W) takes the least memory,
    estimated without running it."""

    def peak(size: int) -> int:
        with pretending():
            model = checkpointed(net, size).to("meta")
            x, y = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)

            def step() -> None:
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            return step_memory(step, [model], optimizer, [x, y]).peak

    return checkpointed(net, min(segment_sizes(net), key=peak))


def _block_starts(chain: nn.Sequential) -> list[int]:
    """Index of the first module of each block."""
    weights = [any(p.ndim >= 2 for p in module.parameters()) for module in chain]
    return [i for i, has in enumerate(weights) if has or i == 0]
