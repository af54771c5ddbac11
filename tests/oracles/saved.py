"""What autograd holds for backward passes yet to come, counted where it saves it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Most bytes saved for backward at any moment of ``run``, a storage that is saved more than
    once counted once; those of ``parameters`` are there anyway and not counted."""
    theirs = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, int] = {}  # address of a storage -> how often it is saved at present
    live = peak = 0

    def pack(tensor: Tensor) -> _Kept:
        nonlocal live, peak
        kept = _Kept(tensor.detach())
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in theirs:
            return kept
        held[address] = held.get(address, 0) + 1
        if held[address] == 1:
            live += size
            peak = max(peak, live)

        def release() -> None:
            nonlocal live
            held[address] -= 1
            if held[address] == 0:
                live -= size

        weakref.finalize(kept, release)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run()
    return peak
