"""Cutting a sequence into pieces such that the most expensive one costs as little as possible."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._operations import saving_as_usual
from .._tracing import watching
from .forward import forward, preserved


def pieces_of(units: object) -> int | None:
    """How many units ``"balanced"`` (2) or ``"balanced-K"`` (K, at least 2) asks for; None where
    ``units`` is something else."""
    text = units if isinstance(units, str) else ""
    found = re.fullmatch(r"balanced(?:-([2-9]|[1-9]\d+))?", text)
    return None if found is None else int(found[1] or 2)


def balanced(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """How many consecutive items each of ``parts`` gets, at least one, so that the largest sum of
    ``costs`` is as small as can be. ValueError for fewer items than parts."""
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parts must be from 1 to the number of items, {n}, got {parts}")
    sums = [0.0, *itertools.accumulate(costs)]

    def shares(largest: float) -> tuple[int, ...]:
        """Fill each part up to the sum ``largest``, but leave an item for each later part. Where
        ``largest`` is too small, items are left over."""
        ends = [0]
        for left in reversed(range(parts)):
            end = start = ends[-1]
            while end < n - left and sums[end + 1] - sums[start] <= largest:
                end += 1
            ends.append(end)
        return tuple(b - a for a, b in itertools.pairwise(ends))

    largest = sorted({b - a for a, b in itertools.combinations(sums, 2)})
    enough = bisect_left(largest, True, key=lambda sum_: sum(shares(sum_)) == n)
    return shares(largest[enough])


def balanced_ends(
    model: nn.Module, example: Any, ends: Sequence[str], pieces: int
) -> frozenset[str]:
    """Which of ``ends``, paths of modules in order of execution, to cut ``model`` at for ``pieces``
    units, such that the most that a unit saves for its backward pass is as little as possible.
    Fewer units if there are fewer ends.

    What units save is measured on ``example``. The last unit is all that follows the last cut, the
    classifier included.
    """
    ends, held = _held(model, example, ends)
    counts = balanced(held, min(pieces, len(held)))
    return frozenset(ends[i - 1] for i in itertools.accumulate(counts[:-1]))


def _held(model: nn.Module, example: Any, ends: Sequence[str]) -> tuple[list[str], list[int]]:
    """``ends`` in the order of their calls, and the bytes that are saved for the backward pass
    before the first, between each two and after the last. Only tensors with the batch as first axis
    count."""
    batch = {len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim}
    called, held = list[str](), [0]
    own = (t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided)
    seen = {t.untyped_storage()._cdata for t in own}
    alive: list[Tensor] = []  # while a storage lives, no other has its address

    def note(t: Tensor) -> None:
        if t.layout != torch.strided or not t.ndim or len(t) not in batch:
            return
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(t.detach())
            held[-1] += min(t.nbytes, storage.nbytes())  # a part of a batch is a view of it

    def end(path: str, *_: Any) -> None:
        called.append(path)
        held.append(0)

    handles = [model.get_submodule(path).register_forward_hook(partial(end, path)) for path in ends]
    with watching(handles), preserved(model), torch.enable_grad(), saving_as_usual(note):
        forward(model, example)
    while called and held[-1] == 0:  # nothing learns after the last end
        called.pop()
        held.pop()
    return called, held
