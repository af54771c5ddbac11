"""The processes that train one run together, started by ``torchrun``; or the only one.

A trainer has a team: :class:`Alone`, or :class:`Together` with what :mod:`svdalign.parallel` makes
of its learner. The first process keeps the run's folder; the others do what it does, batch by
batch, and write nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import storage
from ...engine import Learner, StepReport
from ...parallel import DataParallel, LayerParallel, meet
from ...parallel.link import OTHER, naming
from .config import RunConfig


class RefusedError(ValueError):
    """The run cannot be trained by several processes."""


class Alone:
    """One process trains the run.

    ``part``: (number of this process's part of every batch, number of parts); None if it gets
    activations from another process in place of images. ``rank``, ``size``: number of this process,
    and of processes.
    """

    part: tuple[int, int] | None = (0, 1)
    rank, size = 0, 1

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def step(self, x: Tensor, y: Tensor) -> StepReport:
        """Learn from one batch."""
        return self.learner.step(x, y)

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, this process has the weights of the whole model. All processes enter it
        together."""
        return contextlib.nullcontext()

    def parts(self, sum_: Tensor) -> Tensor:
        """A sum over this process's share of the batches as a part of what all have. The mean of
        the parts is the sum over whole batches."""
        return sum_

    def own(self, parts: Tensor) -> Tensor:
        """This process's part; where there were as many processes, the one that it had."""
        return parts.mean()

    def add(self, sums: Tensor) -> Tensor:
        """The sum of ``sums`` over all processes."""
        return sums

    def agree(self, *asked: bool) -> list[bool]:
        """For each question whether any process answers yes; all get the same answers at the same
        step."""
        return list(asked)

    def save(self, path: Path, extra: Any) -> None:
        """Write a checkpoint of the whole learner."""
        storage.save(self.learner, path, extra=extra)


class Together(Alone):
    """Several processes train the run: the one that ``config.parallel`` names decides how."""

    def __init__(self, config: RunConfig, learner: Learner, example: tuple[Tensor, Tensor]) -> None:
        super().__init__(learner)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        layers = config.parallel == "layers"
        self.part = (self.rank, self.size)
        if layers:
            self.part = None if self.rank else (0, 1)
        try:
            _check(config, self.size)
            self._side = LayerParallel(learner, example) if layers else DataParallel(learner)
        except ValueError as error:
            raise RefusedError(f"--parallel {config.parallel}: {error}") from error
        self._layers = layers
        self._asked = _Asked(self.size)

    def step(self, x: Tensor, y: Tensor) -> StepReport:
        return self._side.step(x, y)

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        return self._side.whole()

    def parts(self, sum_: Tensor) -> Tensor:
        with naming(OTHER):
            if self._layers:  # the last process has the network's output
                last = sum_.clone()
                dist.broadcast(last, self.size - 1)
                return last
            found = sum_.new_empty(self.size)
            dist.all_gather(list(found.unbind()), sum_)
            return found

    def own(self, parts: Tensor) -> Tensor:
        return parts[self.rank].clone() if parts.shape == (self.size,) else super().own(parts)

    def add(self, sums: Tensor) -> Tensor:
        with naming(OTHER):
            dist.all_reduce(sums)
        return sums

    def agree(self, *asked: bool) -> list[bool]:
        return self._asked(asked)

    def save(self, path: Path, extra: Any) -> None:
        self._side.save(path, extra=extra)


class _Asked:
    """Yes-or-no questions of all processes, asked every few steps and answered as many steps later:
    by then every process has asked, and none has to wait for another."""

    def __init__(self, size: int) -> None:
        self._every = 3 * size  # more steps than a pipeline's first process is ahead of its last
        self._group = dist.new_group(backend="gloo")
        self._steps = 0
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, asked: tuple[bool, ...]) -> list[bool]:
        self._steps += 1
        answer = [False] * len(asked)
        if self._steps % self._every == 0:
            if self._pending is not None:
                work, flags = self._pending
                with naming(OTHER):
                    work.wait()
                answer = [bool(flag) for flag in flags.tolist()]
            flags = torch.tensor(asked, dtype=torch.int32)
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = work, flags
        return answer


def _check(config: RunConfig, size: int) -> None:
    if config.parallel == "data" and config.batch_size % size:
        raise ValueError(
            f"batch_size, {config.batch_size}, must be a multiple of the number of processes, "
            f"{size}, which share out every batch"
        )
    if config.parallel == "layers" and config.lookahead is not None:
        raise ValueError(
            "lookahead averages all weights, but each process has those of its own units"
        )


def leads() -> bool:
    """Whether this process keeps the run's folder."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def meeting(config: RunConfig) -> Iterator[RunConfig]:
    """Inside, the processes that ``torchrun`` has started for this run are connected. Yields the
    config with this process's own device.

    ValueError if there are several and the config does not say what for, or the other way round.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel is None:
        if count > 1:
            raise ValueError(
                f"{count} processes were started for one run: say --parallel layers or data"
            )
        yield config
        return
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"parallel {config.parallel} needs processes that torchrun starts, such as torchrun "
            "--nproc-per-node 2 -m svdalign train ...; for one process say --parallel null"
        )
    cuda = torch.device(config.device).type == "cuda"
    if cuda:
        config = replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(config.device)
    meet("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.parallel_timeout))
    try:
        yield config
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """If the first process fails inside, it says so to the others, which would wait for it."""
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            tell(None)
        raise


def tell(news: Any = None) -> Any:
    """The ``news`` of the first process, on every process."""
    found = [news]
    with naming(OTHER):
        dist.broadcast_object_list(found, 0)
    return found[0]
