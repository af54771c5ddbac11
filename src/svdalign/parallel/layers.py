"""Units side by side: a pipeline of processes in which nothing comes back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import storage
from .._files import write
from .._structures import taken_apart
from .._tracing import untraced
from ..engine import Learner, Plan, StepReport
from ..engine.balance import balanced
from ..engine.forward import forward, preserved
from ..engine.streaming import Left, stream
from . import weights
from .balance import unit_seconds
from .borders import at_work, before, check_borders, owners, refuse, tensors_of
from .link import OTHER, Link, naming


class LayerParallel:
    """This process's share of the units of ``learner``, in a pipeline of processes.

    Every process runs the same program, started by ``torchrun --nproc-per-node N``::

        learner = sva.Learner(model, "ssa", horizon=0, optimizer=..., example=x)
        stage = sva.parallel.LayerParallel(learner, (x, y))
        for x, y in batches:
            report = stage.step(x, y)
        stage.save("checkpoint.safetensors")

    Process p trains batch t while process p + 1 trains batch t - 1. What belongs to the units of
    other processes, weights, feedback, optimizer state, is let go of. The model's ``forward`` stays
    as it is: what comes before this process's units runs once on tensors without values (torch's
    meta device), and again when the shape of a batch changes; what comes after does not run. Random
    numbers (dropout) are each process's own.

    Args:
        learner: the same on every process.
        example: a batch (x, y), to time the units and to find what they read.
        partition: how many units each process gets, at least one each; by default shares of about
            equal measured time.
        ahead: how many batches a process may be ahead of the next one, at least 1.
        group: of processes; None for all.

    Raises:
        ValueError: for what cannot be split like this: ``horizon=None``; ``error="output"``, which
            only the last process would know; weights shared by units of two processes; a unit that
            reads more of an earlier process than what the unit before it hands on; a ``partition``
            that does not fit.
    """

    def __init__(
        self,
        learner: Learner,
        example: tuple[Any, Tensor],
        *,
        partition: Sequence[int] | None = None,
        ahead: int = 2,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        refuse(learner)
        self.learner, self.model, self.plan = learner, learner.model, learner.plan
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._device = next(learner.model.parameters()).device
        self._link = Link(self.rank, group, ahead, self._device)
        units = self.plan.units
        self.seconds: list[float] | None = None  #: of each unit, where it was measured
        if partition is None:
            self.seconds = self._measured(example)
            partition = balanced(self.seconds, self.size)
        self.partition = tuple(partition)
        if len(self.partition) != self.size or sum(self.partition) != len(units) or 0 in partition:
            raise ValueError(
                f"partition must give each of {self.size} processes one of the {len(units)} units "
                f"or more, {len(units)} in all, got {self.partition}"
            )
        place = [rank for rank, count in enumerate(self.partition) for _ in range(count)]
        first = place.index(self.rank)
        calls = at_work(learner, example[0])
        self._owners = owners(learner, calls, place)
        #: Outputs of the modules before this process's units, and the batch that they were for.
        self._made = {self.model.get_submodule(path): list[Any]() for path in before(calls, first)}
        self._made_for = ""
        border = check_borders(learner, example[0], place, first)
        self._entry = units[first - 1].exit if self.rank else None
        own = units[first : first + self.partition[self.rank]]
        self.units = own  #: those of this process
        self._last = self.rank == self.size - 1
        self._stage: Plan = replace(self.plan, units=own if self._last else (*own, units[-1]))
        names = weights.names(learner)
        self._groups = [[names[p] for p in g["params"]] for g in learner.optimizer.param_groups]
        self._manifold = learner._on_the_manifold
        learner._one_pass = self._one_pass
        self._let_go()
        self._probe(example[0], border)

    def _measured(self, example: tuple[Any, Tensor]) -> list[float]:
        """Seconds of each unit, the mean over the processes: one slow moment of one of them is not
        to decide the balance of all."""
        each: list[list[float]] = [[]] * self.size
        with naming(OTHER):
            dist.all_gather_object(each, unit_seconds(self.learner, *example), self._group)
        return [sum(seconds) / self.size for seconds in zip(*each, strict=True)]

    @property
    def sent(self) -> int:
        """Bytes sent so far."""
        return self._link.sent

    @property
    def waited(self) -> float:
        """Seconds spent so far waiting for the process before."""
        return self._link.waited

    def step(self, x: Any, y: Tensor) -> StepReport:
        """Train this process's units on one batch, the same on every process.

        Of ``x`` only the first process reads values, the others its shape; ``y`` goes along with
        the activations. The report is of this process's units; ``loss`` and ``accuracy`` are those
        of the network on the last process, NaN and None on the others.
        """
        self.learner.optimizer.zero_grad(set_to_none=True)
        report = self.backward(x, y)
        self.learner.update()
        return report

    def backward(self, x: Any, y: Tensor) -> StepReport:
        """:meth:`Learner.backward` of this process's units. ``x`` and ``y`` as in :meth:`step`."""
        received: list[Tensor] = []
        if self.rank:
            *received, y = self._link.receive()
        self._targets = y
        with self._entering(received, learn=True):
            return self.learner.backward(x, y)

    def __call__(self, x: Any) -> Tensor:
        """The network's output for ``x``, on every process."""
        z = self._run(x, self._link.receive() if self.rank else [], self._link.send)
        found: Tensor = _from(self.size - 1, None if z is None else z.cpu(), self._group)
        return found.to(self._device)

    @contextlib.contextmanager
    def whole(self) -> Iterator[Learner]:
        """The learner with the weights of all units, on every process; to be entered by all.

        For what needs the whole model: ``reduce_rank``, ``compact``, evaluation by other means.
        What is changed inside must be changed alike on every process. The optimizer holds the
        parameters of this process alone, also inside.
        """
        for name, owner in self._owners.items():
            if owner is not None:
                self._fetch(name, owner)
        self.learner._on_the_manifold = self._manifold
        try:
            yield self.learner
        finally:
            self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`Learner.state_dict` of one process would be, on every process."""
        with self.whole() as learner:
            state = learner.state_dict()
            names = weights.names(learner)
        mine = {names[p]: s for p, s in self.learner.optimizer.state.items() if p in names}
        each: list[dict[str, Any]] = [{}] * self.size
        with naming(OTHER):
            dist.all_gather_object(each, mine, self._group)
        states = {name: state for states in each for name, state in states.items()}
        order = {name: i for i, name in enumerate(itertools.chain(*self._groups))}
        for group, members in zip(state["optimizer"]["param_groups"], self._groups, strict=True):
            group["params"] = [order[name] for name in members]
        state["optimizer"]["state"] = {
            order[name]: value for name, value in states.items() if name in order
        }
        return state

    def save(self, path: str | Path, *, extra: Any = None) -> None:
        """Write the file that :func:`svdalign.save` writes, from the first process. One process or
        any number go on from it: load it into the learner before wrapping it."""
        state = self.state_dict()
        if self.rank == 0:
            state |= {"random": storage.random_state(), "extra": extra}
            write(path, state, ranks=storage.ranks(self.model))
        with naming(OTHER):
            dist.barrier(self._group)

    # --- one pass -------------------------------------------------------------------------------

    def _one_pass(self, model: nn.Module, plan: Plan, x: Any, **how: Any) -> Tensor | None:
        leave = None if self._last else self._leave
        return stream(model, self._stage, x, leave=leave, **how)

    def _leave(self, handed_on: Any) -> None:
        self._link.send([*tensors_of(handed_on), self._targets])

    @contextlib.contextmanager
    def _entering(self, received: Sequence[Tensor], *, learn: bool) -> Iterator[None]:
        """Inside, a forward pass starts at this process's first unit, with the tensors received."""
        if self._entry is None:
            yield
            return

        looks = ""
        stack = contextlib.ExitStack()

        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal looks
            torch.set_grad_enabled(False)
            shapes = tree_map_only(Tensor, lambda t: (t.shape, t.dtype), (args, kwargs))
            looks = str((module.training, shapes))
            self._skip(looks, stack)
            return tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))

        def enter(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(learn)
            self._made_for = looks
            values, like_output = taken_apart(output)
            news = iter(received)
            return like_output([next(news) if isinstance(v, Tensor) else v for v in values])

        entry = self.model.get_submodule(self._entry)
        with stack:
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            stack.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(entry.register_forward_hook(untraced(enter)).remove)
            yield

    def _skip(self, looks: str, stack: contextlib.ExitStack) -> None:
        """Until ``stack`` closes, let the modules before this process's units return what they did
        for the last batch, if that had the same shapes. Otherwise record what they return."""
        if looks == self._made_for:
            for module, outputs in self._made.items():
                stack.enter_context(_handing_on(module, outputs))
            return
        self._made_for = ""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._made[module].append(output)

        for module, outputs in self._made.items():
            outputs.clear()
            stack.callback(module.register_forward_hook(untraced(note), prepend=True).remove)

    @torch.no_grad()
    def _run(
        self, x: Any, received: Sequence[Tensor], leave: Callable[[list[Tensor]], None]
    ) -> Tensor | None:
        """This process's part of a forward pass; the network's output on the last process."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leave(tensors_of(output))
            raise Left

        with contextlib.ExitStack() as stack:
            if not self._last:
                end = self.model.get_submodule(self.units[-1].exit)
                stack.callback(end.register_forward_hook(untraced(hook)).remove)
            stack.enter_context(self._entering(received, learn=False))
            stack.enter_context(contextlib.suppress(Left))
            return forward(self.model, x)
        return None

    def _probe(self, x: Any, border: list[Tensor]) -> None:
        """ValueError if the model's forward cannot be taken up at this process's first unit."""
        try:
            with preserved(self.model):
                self._run(x, border, lambda handed_on: None)
        except Exception as error:
            raise ValueError(
                f"the model's forward cannot be taken up after {self._entry!r}: {error}"
            ) from error

    # --- weights --------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Free weights, feedback and optimizer state of the units of other processes."""
        learner = self.learner
        foreign = {name for name, owner in self._owners.items() if owner not in (None, self.rank)}
        names = weights.names(learner)
        for group in learner.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if names.get(p, "") not in foreign]
        for p in [p for p in learner.optimizer.state if names.get(p, "") in foreign]:
            del learner.optimizer.state[p]
        for name in foreign:
            tensor = weights.get(learner, name)
            weights.put(learner, name, torch.empty_like(tensor, device="meta"))
        learner._on_the_manifold = [m for m in self._manifold if not m.U.is_meta]

    def _fetch(self, name: str, owner: int) -> None:
        """Fetch the values of ``name`` from the process that owns them."""
        tensor = weights.get(self.learner, name)
        if owner == self.rank:
            dist.broadcast(tensor.detach().contiguous(), group=self._group, group_src=owner)
            return
        real = torch.empty_like(tensor, device=self._device)
        values = torch.empty(real.shape, dtype=real.dtype, device=self._device)
        dist.broadcast(values, group=self._group, group_src=owner)
        weights.put(self.learner, name, real.copy_(values))


@contextlib.contextmanager
def _handing_on(module: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, calls of ``module`` compute nothing and return ``outputs``, one after the other."""
    own = vars(module).get("forward")
    left = iter(outputs)
    module.forward = lambda *args, **kwargs: next(left)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _from(rank: int, value: Any, group: dist.ProcessGroup | None) -> Any:
    """The ``value`` of process ``rank``, on every process."""
    found = [value]
    with naming(f"process {rank}"):
        dist.broadcast_object_list(found, group=group, group_src=rank)
    return found[0]
