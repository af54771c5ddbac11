"""From process to process: tensors to the next one of a pipeline, and from the one before."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OTHER = "another process"

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DIMS = 6  #: axes a tensor may have
_MOST = 8  #: tensors that may be sent at once
_ENTRY = 3 + _DIMS  #: numbers that describe a tensor: dtype, whether channels last, axes, shape


class PeerError(RuntimeError):
    """Another process has ended, or did nothing until the group's time was out."""


class Link:
    """Tensors to the next process of a pipeline and from the one before, shapes included.

    ``ahead``: how many batches this process may be ahead of the next one. ``device``: where
    received tensors are to be. ``sent``: bytes so far. ``waited``: seconds so far, for either.
    """

    def __init__(
        self, rank: int, group: dist.ProcessGroup | None, ahead: int, device: torch.device
    ) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self.rank, self.group, self.ahead, self.device = rank, group, ahead, device
        self.sent, self.waited = 0, 0.0
        # NCCL sends from and to GPUs alone, gloo from and to the CPU.
        self._wire = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self._pending: deque[list[tuple[Any, Tensor]]] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To the next process. Waits while that one is ``ahead`` batches behind."""
        if len(tensors) > _MOST or any(t.ndim > _DIMS for t in tensors):
            raise ValueError(
                f"a unit at the border of two processes may hand on {_MOST} tensors of {_DIMS} "
                f"axes at most, got {[tuple(t.shape) for t in tensors]}"
            )
        head = torch.zeros(1 + _MOST * _ENTRY, dtype=torch.int64)
        head[0] = len(tensors)
        parts = [head]
        for i, tensor in enumerate(tensors):
            last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            entry = [_DTYPES.index(tensor.dtype), int(last), tensor.ndim, *tensor.shape]
            at = 1 + i * _ENTRY
            head[at : at + len(entry)] = torch.tensor(entry)
            parts.append(tensor.permute(0, 2, 3, 1) if last else tensor.contiguous())
        parts = [part.to(self._wire) for part in parts]
        to = self.rank + 1
        self._pending.append([(dist.isend(p, group=self.group, group_dst=to), p) for p in parts])
        self.sent += sum(p.numel() * p.element_size() for p in parts)
        with self._waiting(f"process {to}, which trains the units after,"):
            while len(self._pending) > self.ahead:
                for work, _ in self._pending.popleft():
                    work.wait()

    def receive(self) -> list[Tensor]:
        """From the process before, in the order sent."""
        with self._waiting(f"process {self.rank - 1}, which trains the units before,"):
            count, *numbers = self._next((1 + _MOST * _ENTRY,), torch.int64).tolist()
            tensors = []
            for at in range(0, count * _ENTRY, _ENTRY):
                dtype, last, ndim = numbers[at : at + 3]
                shape = numbers[at + 3 : at + 3 + ndim]
                if last:
                    shape = [shape[0], shape[2], shape[3], shape[1]]
                tensor = self._next(shape, _DTYPES[dtype]).to(self.device)
                tensors.append(tensor.permute(0, 3, 1, 2) if last else tensor)
            return tensors

    def _next(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._wire)
        dist.recv(tensor, group=self.group, group_src=self.rank - 1)
        return tensor

    @contextlib.contextmanager
    def _waiting(self, which: str) -> Iterator[None]:
        started = time.perf_counter()
        with naming(which):
            yield
        self.waited += time.perf_counter() - started


@contextlib.contextmanager
def naming(which: str) -> Iterator[None]:
    """Inside, a call of ``torch.distributed`` that fails raises an error that names the process
    which did not answer. For such calls alone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"{which} has ended or hangs: {error}") from error
