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

_LEVEL = 1.02  #: peaks that differ by less are one


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


def checkpointed(net: nn.Module, size: int, segments: int | None = None) -> nn.Module:
    """A copy of ``net`` whose chains run as segments of ``size`` blocks each: the first so many
    ``segments``, or all.

    A chain is ``net`` itself if it is an ``nn.Sequential``, else every ``nn.Sequential`` among its
    children. A block is a module with a weight matrix and the modules without one that follow it
    (norm, activation, pooling), or a residual block. The last block of a ``net`` that is a chain
    itself leads to the output and stays as it is.
    """
    net = copy.deepcopy(net)
    for name, cuts in _cuts(net, size).items():
        if segments is not None:
            cuts = cuts[: segments + 1]
            segments -= len(cuts) - 1
        chain = net.get_submodule(name)
        assert isinstance(chain, nn.Sequential)
        made = CheckpointedSequential.of(chain, cuts)
        if chain is net:
            return made
        net.set_submodule(name, made)
    return net


def choices(net: nn.Module) -> list[tuple[int, int]]:
    """What to try: sizes of segments, and how many of them. Sizes: one block, and the square root
    of the number of blocks in the longest chain. The first maps are often the largest, so 1, 2, 4,
    … segments are tried as well as all of them."""
    longest = max(_segments(net, 1), default=1)
    sizes = dict.fromkeys((1, math.ceil(math.sqrt(longest))))
    found = []
    for size in sizes:
        total = sum(_segments(net, size))
        found += [(size, 2**i) for i in range(total.bit_length()) if 2**i < total] + [(size, total)]
    return found


def smallest_checkpointed(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The copy whose training step on images of ``shape`` (N, C, H, W) takes the least memory,
    estimated without running it; of those that take at most 2 % more, the one that runs the fewest
    blocks twice."""

    with pretending():
        shadow = copy.deepcopy(net).to("meta")  # once: each choice copies it, without values

    def peak(size: int, segments: int) -> int:
        with pretending():
            model = checkpointed(shadow, size, segments)
            x, y = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)

            def step() -> None:
                F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]

            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            return step_memory(step, [model], optimizer, [x, y]).peak

    peaks = {choice: peak(*choice) for choice in choices(net)}
    small = [choice for choice, size in peaks.items() if size <= _LEVEL * min(peaks.values())]
    return checkpointed(net, *min(small, key=math.prod))


def _segments(net: nn.Module, size: int) -> list[int]:
    """How many segments each chain of ``net`` has."""
    return [len(cuts) - 1 for cuts in _cuts(net, size).values()]


def _cuts(net: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    """By the path of each chain, where its segments start, and the end of the last one."""
    if isinstance(net, nn.Sequential):
        *starts, end = _block_starts(net)
        return {"": (*starts[::size], end)}
    return {
        name: (*_block_starts(child)[::size], len(child))
        for name, child in net.named_children()
        if isinstance(child, nn.Sequential)
    }


def _block_starts(chain: nn.Sequential) -> list[int]:
    """Index of the first module of each block."""
    weights = [any(p.ndim >= 2 for p in module.parameters()) for module in chain]
    return [i for i, has in enumerate(weights) if has or i == 0]
