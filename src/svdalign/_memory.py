"""Peak memory of a training step, split into its parts, and of an inference.

On CUDA the allocator knows. On the CPU every tensor made while :class:`LiveTensors` is active is
followed by its storage: from the operation that made it to the moment its last reference, that of
autograd included, is gone. Scratch space inside an operation is not seen.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_iter

from ._operations import Operations
from .engine.forward import evaluating


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the moment of the peak. ``activations`` is everything else: activations saved
    for the backward pass, the batch, temporaries."""

    peak: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def activations(self) -> int:
        """Bytes of the peak that are no parameter, gradient or optimizer state."""
        return self.peak - self.parameters - self.gradients - self.optimizer

    def as_dict(self) -> dict[str, int]:
        """The peak and its parts, ready for JSON."""
        return {**dataclasses.asdict(self), "activations": self.activations}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind ``tensors``, a storage that several share counted once."""
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


class LiveTensors(Operations):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors while active: ``live`` now, ``peak`` so far.

    ``existing`` tensors count from the start; others from the operation that returns them.
    ``on_peak`` is called with every new peak, the first being what exists.
    """

    def __init__(
        self, existing: Iterable[Tensor] = (), on_peak: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._on_peak: Callable[[int], None] | None = None
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in existing:
            self._follow(tensor)
        if on_peak is not None:
            on_peak(self.peak)
            self._on_peak = on_peak

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself; what it returns is followed."""
        result = func(*args, **kwargs)
        reused = args[0] if _accumulates(func, sys._getframe(2)) else None  # who called torch
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, reused)
        return result

    def _follow(self, tensor: Tensor, reused: Tensor | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        held = self.live - (0 if reused is None else reused.untyped_storage().nbytes())
        if held > self.peak:
            self.peak = held
            if self._on_peak is not None:
                self._on_peak(self.peak)


def _accumulates(func: object, caller: FrameType | None) -> bool:
    """Whether this is autograd itself adding two gradients of one tensor.

    It does so in the memory of the first, but out of place while a dispatch mode looks on
    (``can_accumulate_inplace`` in torch's input_buffer.cpp); that copy would not be there.
    """
    if func is not torch.ops.aten.add.Tensor:
        return False
    while caller is not None and caller.f_globals["__name__"].startswith(("torch._c", "torch._d")):
        caller = caller.f_back  # what torch.compile wraps a dispatch mode in
    return caller is not None and caller.f_code is _engine_run_backward.__code__


def inference_memory(model: nn.Module, batch: Tensor) -> int:
    """Bytes alive at the peak of a forward pass in eval mode: weights, buffers, the batch and maps
    that are still to be read. Of tensors as the program makes them, whatever the device."""
    with evaluating(model), torch.no_grad():
        tracker = LiveTensors([*model.parameters(), *model.buffers(), batch])
        with tracker:
            model(batch)
    return tracker.peak


def step_memory(
    step: Callable[[], object],
    modules: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    batch: Iterable[Tensor] = (),
) -> Memory:
    """Run ``step`` once and return the memory at its peak, split into its parts.

    Args:
        step: one training step; it does change the model.
        modules: those whose parameters and buffers are counted: the model, and the feedback if any.
        optimizer: of these parameters; run a step before, so that its state exists.
        batch: input and labels, part of the peak.
    """
    owned = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    batch = list(batch)

    def gradients() -> list[Tensor]:
        return [t.grad for t in owned if t.grad is not None]

    def state() -> list[Tensor]:
        return [t for t in tree_iter(dict(optimizer.state)) if isinstance(t, Tensor) and t.dim()]

    cuda = bool(owned) and owned[0].is_cuda
    parameters, optimizer_state = storage_bytes(owned), storage_bytes(state())
    split = Memory(0, 0, 0, 0)

    def note(peak: int) -> None:
        nonlocal split
        split = Memory(peak, parameters, storage_bytes(gradients()), optimizer_state)

    before = [*owned, *gradients(), *state(), *batch]
    tracker = LiveTensors(before, note)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - storage_bytes(before)
    del before  # else gradients of the step before live on
    with tracker:
        step()
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - others
        return Memory(peak, split.parameters, split.gradients, split.optimizer)
    return split
