"""Samples side by side: every process has the whole model and samples of its own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import storage
from ..engine import Learner, StepReport
from .borders import refuse_early_updates
from .link import OTHER, naming


class DataParallel:
    """``learner`` on every process, each with samples of its own; gradients are averaged.

    The average of a unit's gradients is under way while the next unit runs. Weights and feedback
    start as those of the first process and stay alike everywhere, bit for bit. So do ranks: call
    ``reduce_rank`` on every process. Batch norms take the statistics of their own process.

    It equals one process on the whole batch where the loss is a mean over samples and batches are
    of one size. A loss that compares samples (similarity) compares those of one process.

    Args:
        learner: built alike on every process.
        group: of processes; None for all.

    Raises:
        ValueError: for a learner that updates its units early, before gradients are averaged.
    """

    def __init__(self, learner: Learner, *, group: dist.ProcessGroup | None = None) -> None:
        refuse_early_updates(learner)
        self.learner, self.group = learner, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        times = Counter(name for unit in learner.units for name in unit.parameters)
        model = learner.model
        #: Weights of several units: their gradients are complete when the last of these is done.
        self._shared = {id(model.get_parameter(name)) for name, n in times.items() if n > 1}
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._reduced: set[int] = set()
        self.sent = 0  #: bytes of gradients handed to the process group so far
        for part in (model, learner.feedback):
            self._as_first([*part.parameters(), *part.buffers()])
        learner._retired = lambda unit, parameters: self._reduce(
            [p for p in parameters if id(p) not in self._shared]
        )

    def step(self, x: Any, y: Tensor) -> StepReport:
        """Learn from this process's share of the batch. The report is of this share.

        :class:`PeerError` if another process has ended, or does nothing until the group's time is
        out.
        """
        self.learner.optimizer.zero_grad(set_to_none=True)
        report = self.backward(x, y)
        self.learner.update()
        return report

    def backward(self, x: Any, y: Tensor) -> StepReport:
        """:meth:`Learner.backward`: the gradients are means over the processes afterwards."""
        learner = self.learner
        report = learner.backward(x, y)
        names = (*learner.model.parameters(), *learner.feedback.parameters())
        self._reduce([p for p in names if id(p) not in self._reduced])
        for work, flat, parameters in self._pending:
            with naming(OTHER):
                work.wait()
            gradients = torch.split(flat.div_(self.size), [p.numel() for p in parameters])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(gradient.view_as(parameter.grad))
        self._pending.clear()
        self._reduced.clear()
        return report

    @contextlib.contextmanager
    def whole(self) -> Iterator[Learner]:
        """The learner, alike on every process inside: batch norms have the statistics of the first
        one. To be entered by all, to evaluate and to save."""
        self._as_first([*self.learner.model.buffers()])
        yield self.learner

    def save(self, path: str | Path, *, extra: Any = None) -> None:
        """Write the file that :func:`svdalign.save` writes, from the first process."""
        with self.whole() as learner:
            if self.rank == 0:
                storage.save(learner, path, extra=extra)
        with naming(OTHER):
            dist.barrier(self.group)

    @torch.no_grad()
    def _as_first(self, tensors: Iterable[Tensor]) -> None:
        """Make the tensors what they are on the first process."""
        for tensor in tensors:
            values = tensor.detach().contiguous()
            with naming(OTHER):
                dist.broadcast(values, group=self.group, group_src=0)
            tensor.copy_(values)

    def _reduce(self, parameters: Sequence[Tensor]) -> None:
        """Start to sum gradients over the processes."""
        own = [p for p in parameters if p.grad is not None]
        self._reduced.update(map(id, own))
        if own:
            flat = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
            self.sent += flat.numel() * flat.element_size()
            with naming(OTHER):
                work = dist.all_reduce(flat, group=self.group, async_op=True)
            self._pending.append((work, flat, own))
