"""Units of about equal memory: where to cut so that the largest of them holds the least."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .forward import forward, preserved

__all__ = ["balanced", "pieces_of"]


def pieces_of(units: object) -> int | None:
    """How many units ``"balanced"`` (2) or ``"balanced-K"`` (K, at least 2) asks for; None where
    ``units`` is something else."""
    found = (
        re.fullmatch(r"balanced(?:-([2-9]|[1-9]\d+))?", units) if isinstance(units, str) else None
    )
    return None if found is None else int(found[1] or 2)


def balanced(model: nn.Module, example: Any, ends: Sequence[str], pieces: int) -> frozenset[str]:
    """Those of ``ends``, paths of modules in order of execution, that cut ``model`` into ``pieces``
    units so that the largest holds the least for its backward pass; fewer where there are fewer.

    What is held is measured on ``example``. What follows the last cut is the last unit, the
    classifier with it.
    """
    ends, held = _held(model, example, ends)
    sums = [0, *itertools.accumulate(held)]
    # best[i]: least size of the largest of the units up to the i-th stretch, and their cuts.
    best = [(size, ()) for size in sums[1:]]
    for _ in range(min(pieces, len(held)) - 1):
        best = [
            min(
                (
                    (max(best[cut][0], sums[i + 1] - sums[cut + 1]), (*best[cut][1], cut))
                    for cut in range(i)
                ),
                default=best[i],
            )
            for i in range(len(held))
        ]
    return frozenset(ends[cut] for cut in best[-1][1])


def _held(model: nn.Module, example: Any, ends: Sequence[str]) -> tuple[list[str], list[int]]:
    """``ends`` as they are called, and the bytes that each stretch between them, before the first
    and after the last saves for its backward pass, of tensors with the batch as first axis."""
    batch = {len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim}
    called, held = list[str](), [0]
    seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # so that no other storage takes the place of one that was counted

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if t.ndim and len(t) in batch and storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(t.detach())
            held[-1] += storage.nbytes()
        return t

    def end(path: str, *_: Any) -> None:
        called.append(path)
        held.append(0)

    handles = [model.get_submodule(path).register_forward_hook(partial(end, path)) for path in ends]
    try:
        with (
            preserved(model),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, _as_it_is),
        ):
            forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return called, held


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
