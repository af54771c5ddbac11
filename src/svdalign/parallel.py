"""Training on several processes: units side by side, or samples side by side.

Both wrap an ordinary :class:`Learner`, made alike on every process (same seed), and use
``torch.distributed``, which ``torchrun`` sets up.

**Layers.** A unit at horizon 0 needs nothing from the units after it. So one process can train the
first units on batch t while the next process trains the units that follow on batch t - 1.
Activations and targets go forward, nothing comes back, no process waits for a later one, and no
old weights are kept. See :class:`LayerParallel`.

**Data.** Every process trains all units, on samples of its own. A unit's gradients are complete
when it retires, so they are averaged while the next unit runs. See :class:`DataParallel`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import storage
from .engine import Learner, Plan, StepReport
from .engine.forward import forward, preserved
from .engine.ownership import reached
from .engine.streaming import stream

__all__ = ["DataParallel", "LayerParallel", "balanced", "unit_seconds"]


# --- which units where --------------------------------------------------------------------------


def unit_seconds(learner: Learner, x: Any, y: Tensor, repeats: int = 3) -> list[float]:
    """Seconds that each unit takes for a batch, forward and backward, the least of ``repeats``.

    Measured on this process; the learner stays as it is. Meant for horizon 0: with more, a unit's
    backward pass waits for units after it and is counted with them.
    """
    ends: dict[str, float] = {}
    found: list[list[float]] = []
    retired = learner._retired
    learner._retired = lambda unit, _: ends.update({unit.name: time.perf_counter()})
    try:
        for _ in range(repeats + 1):  # the first is a warm-up
            ends.clear()
            last = time.perf_counter()
            learner.gradients(x, y)
            seconds = []
            for unit in learner.units:  # a frozen one does not retire: what it takes is the next's
                end = ends.get(unit.name, last)
                seconds.append(end - last)
                last = end
            found.append(seconds)
    finally:
        learner._retired = retired
    return [min(times) for times in zip(*found[1:], strict=True)]


def balanced(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """How many consecutive items each of ``parts`` gets, at least one, so that the largest sum of
    ``costs`` is as small as can be. ValueError for fewer items than parts."""
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parts must be from 1 to the number of items, {n}, got {parts}")
    sums = [0.0, *itertools.accumulate(costs)]
    # best[i]: the first i items in the parts so far: their largest sum, and how many each has.
    best: dict[int, tuple[float, tuple[int, ...]]] = {i: (sums[i], (i,)) for i in range(1, n + 1)}
    for _ in range(1, parts):
        best = {
            i: min(
                (max(largest, sums[i] - sums[j]), (*counts, i - j))
                for j, (largest, counts) in best.items()
                if j < i
            )
            for i in range(min(best) + 1, n + 1)
        }
    return best[n][1]


# --- units side by side -------------------------------------------------------------------------


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
    as it is: what comes before this process's units runs on tensors without values (torch's meta
    device), what comes after does not run. Random numbers (dropout) are each process's own.

    ``example``: a batch (x, y), to time the units and to find what they read. ``partition``: how
    many units each process gets; by default shares of about equal measured time. ``ahead``: how
    many batches a process may be ahead of the next one. ``group``: the default one if None.

    Raises ValueError for what cannot be split like this: ``horizon=None``, ``error="output"`` (only
    the last process would know it), weights shared by units of two processes, a unit that reads
    more of an earlier process than what the unit before it hands on, and a ``partition`` that does
    not fit.
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
        _refuse(learner)
        self.learner, self.model, self.plan = learner, learner.model, learner.plan
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._link = group, _Link(self.rank, group, ahead)
        units = self.plan.units
        self.seconds: list[float] | None = None  #: of each unit, where it was measured
        if partition is None:
            self.seconds = _agree(unit_seconds(learner, *example), group)
            partition = balanced(self.seconds, self.size)
        self.partition = tuple(partition)
        if len(self.partition) != self.size or sum(self.partition) != len(units) or 0 in partition:
            raise ValueError(
                f"partition must give each of {self.size} processes one of the {len(units)} units "
                f"or more, {len(units)} in all, got {self.partition}"
            )
        place = [rank for rank, count in enumerate(self.partition) for _ in range(count)]
        first = place.index(self.rank)
        self._owners = _owners(learner, example[0], place)
        border = _check_borders(learner, example[0], place, first)
        self._entry = units[first - 1].exit if self.rank else None
        own = units[first : first + self.partition[self.rank]]
        self.units = own  #: those of this process
        self._last = self.rank == self.size - 1
        self._stage: Plan = replace(self.plan, units=own if self._last else (*own, units[-1]))
        names = _names(learner)
        self._groups = [[names[p] for p in g["params"]] for g in learner.optimizer.param_groups]
        self._manifold = learner._on_the_manifold
        learner._one_pass = self._one_pass
        self._let_go()
        self._probe(example[0], border)

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
        return _from_last(z, self.size - 1, self._group)

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
            names = _names(learner)
        mine = {names[p]: s for p, s in self.learner.optimizer.state.items() if p in names}
        states: dict[str, Any] = {}
        for rank in range(self.size):
            states |= _exchange(mine if rank == self.rank else None, rank, self._group)
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
            storage.write(path, state, ranks=storage.ranks(self.model))
        dist.barrier(self._group)

    # --- one pass -------------------------------------------------------------------------------

    def _one_pass(self, model: nn.Module, plan: Plan, x: Any, **how: Any) -> Tensor | None:
        leave = None if self._last else self._leave
        return stream(model, self._stage, x, leave=leave, **how)

    def _leave(self, handed_on: Any) -> None:
        self._link.send([*_tensors(handed_on), self._targets])

    @contextlib.contextmanager
    def _entering(self, received: Sequence[Tensor], *, learn: bool) -> Iterator[None]:
        """Inside, a forward pass takes up at this process's first unit, with what was received."""
        if self._entry is None:
            yield
            return

        def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
            torch.set_grad_enabled(False)
            return tree_map(_without_values, (args, kwargs))

        def enter(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(learn)
            values, structure = tree_flatten(output)
            news = iter(received)
            return tree_unflatten(
                [next(news) if isinstance(v, Tensor) else v for v in values], structure
            )

        handles = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.get_submodule(self._entry).register_forward_hook(enter),
        ]
        mode = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(mode)
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _run(
        self, x: Any, received: Sequence[Tensor], leave: Callable[[list[Tensor]], None]
    ) -> Tensor | None:
        """This process's part of a forward pass; the network's output on the last process."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leave(_tensors(output))
            raise _Left

        with contextlib.ExitStack() as stack:
            if not self._last:
                end = self.model.get_submodule(self.units[-1].exit)
                stack.callback(end.register_forward_hook(hook).remove)
            stack.enter_context(self._entering(received, learn=False))
            stack.enter_context(contextlib.suppress(_Left))
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
        """Keep the values of this process's units alone."""
        learner = self.learner
        foreign = {name for name, owner in self._owners.items() if owner not in (None, self.rank)}
        names = _names(learner)
        for group in learner.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if names.get(p, "") not in foreign]
        for p in [p for p in learner.optimizer.state if names.get(p, "") in foreign]:
            del learner.optimizer.state[p]
        for name in foreign:
            tensor = _get(learner, name)
            _set(learner, name, torch.empty_like(tensor, device="meta"))
        learner._on_the_manifold = [m for m in self._manifold if not m.U.is_meta]

    def _fetch(self, name: str, owner: int) -> None:
        """Have the values of ``name`` from the process that they belong to."""
        tensor = _get(self.learner, name)
        if owner == self.rank:
            dist.broadcast(tensor.detach().contiguous(), group=self._group, group_src=owner)
            return
        real = torch.empty_like(tensor, device=self._device)
        values = torch.empty(real.shape, dtype=real.dtype, device=self._device)
        dist.broadcast(values, group=self._group, group_src=owner)
        _set(self.learner, name, real.copy_(values))

    @property
    def _device(self) -> torch.device:
        name = self.units[0].parameters[:1]
        return self.model.get_parameter(name[0]).device if name else torch.device("cpu")


class _Left(BaseException):
    """Ends a forward pass early. No ``except Exception`` of the model's own stops it."""


def _refuse(learner: Learner) -> None:
    if learner.horizon is None:
        raise ValueError(
            "horizon=None is backpropagation, whose errors come back through all units: no unit "
            "can learn before the last one has run. Give a horizon, best 0"
        )
    if learner.rule.error == "output" and len(learner.feedback):
        raise ValueError(
            f"rule {learner.rule.name!r} teaches with the output's error, which the last process "
            'alone knows; use error="local" or error="target"'
        )


def _without_values(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _tensors(output: Any) -> list[Tensor]:
    return [v.detach() for v in tree_flatten(output)[0] if isinstance(v, Tensor)]


# --- whose is what ------------------------------------------------------------------------------


def _names(learner: Learner) -> dict[Tensor, str]:
    """Every parameter's name, of the model and of the feedback."""
    parts = {"model": learner.model, "feedback": learner.feedback}
    return {p: f"{part}.{n}" for part, m in parts.items() for n, p in m.named_parameters()}


def _module(learner: Learner, name: str) -> tuple[nn.Module, str]:
    part, _, path = name.partition(".")
    root: nn.Module = learner.model if part == "model" else learner.feedback
    owner, _, leaf = path.rpartition(".")
    return root.get_submodule(owner), leaf


def _get(learner: Learner, name: str) -> Tensor:
    module, leaf = _module(learner, name)
    tensor = module._parameters.get(leaf)
    found = module._buffers[leaf] if tensor is None else tensor
    assert found is not None
    return found


def _set(learner: Learner, name: str, value: Tensor) -> None:
    module, leaf = _module(learner, name)
    old = module._parameters.get(leaf)
    if old is None:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)


def _owners(learner: Learner, x: Any, place: Sequence[int]) -> dict[str, int | None]:
    """Process of every parameter and buffer by its name; None for what every process keeps."""
    model, units = learner.model, learner.units
    owners: dict[str, int | None] = {}
    for unit, rank in zip(units, place, strict=True):
        for name in unit.parameters:
            if owners.setdefault(f"model.{name}", rank) != rank:
                raise ValueError(
                    f"parameter {name!r} is shared by units of processes "
                    f"{owners[f'model.{name}']} and {rank}; give a partition that keeps them "
                    "together"
                )
    by_index = {str(i): rank for i, rank in enumerate(place)}
    for name, _ in (*learner.feedback.named_parameters(), *learner.feedback.named_buffers()):
        owners[f"feedback.{name}"] = by_index[name.partition(".")[0].partition("_")[0]]
    calls = _calls(learner, x)
    for name, _ in model.named_buffers():
        path = name
        while path and path not in calls:  # a module that is not called is at work in its parent
            path = path.rpartition(".")[0]
        ranks = {place[i] for i in calls[path]}
        # What is at work in several processes keeps its buffers in all of them.
        owners[f"model.{name}"] = min(ranks) if len(ranks) == 1 else None
    return owners


def _calls(learner: Learner, x: Any) -> dict[str, set[int]]:
    """By path of each module that is called, the units that it is at work in."""
    ends = Counter(unit.exit for unit in learner.units[:-1])
    found: dict[str, set[int]] = {}
    done = 0
    handles = []

    def begin(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            found.setdefault(path, set()).add(done)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal done
            found[path].update(range(min(found[path]), done + 1))
            done += ends[path] > 0

        return hook

    for path, module in learner.model.named_modules():
        handles += [
            module.register_forward_pre_hook(begin(path)),
            module.register_forward_hook(end(path)),
        ]
    try:
        with preserved(learner.model), torch.no_grad():
            forward(learner.model, x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _check_borders(learner: Learner, x: Any, place: Sequence[int], first: int) -> list[Tensor]:
    """ValueError unless each unit reads of earlier processes only what the unit before hands on.
    Returns what the unit before unit ``first`` hands on for ``x``."""
    units = learner.units
    calls = Counter(unit.exit for unit in units)
    border: list[Tensor] = []
    leaves: list[nn.Parameter] = []
    made_by: dict[int, int] = {}
    at = iter(range(len(units)))

    def check(outputs: list[Tensor], index: int) -> None:
        for leaf in reached(outputs, leaves):
            source = made_by[id(leaf)]
            if place[source] != place[index] and source != place.index(place[index]) - 1:
                raise ValueError(
                    f"unit {units[index].name!r} of process {place[index]} reads what unit "
                    f"{units[source].name!r} of process {place[source]} made, but only what the "
                    "last unit before a process hands on reaches it; give a partition that keeps "
                    "them together"
                )

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        index = next(at)
        values, structure = tree_flatten(output)
        check([v for v in values if isinstance(v, Tensor)], index)
        if index == first - 1:
            border.extend(_tensors(output))
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.requires_grad:
                leaf = nn.Parameter(value.detach())
                leaves.append(leaf)
                made_by[id(leaf)] = index
                values[i] = leaf.clone()
        return tree_unflatten(values, structure)

    ends = [unit for i, unit in enumerate(units[:-1]) if place[i] != place[i + 1]]
    if odd := [unit.exit for unit in ends if calls[unit.exit] > 1]:
        raise ValueError(
            f"module {odd[0]!r}, where one process would end, is called more than once; give "
            "another partition"
        )
    paths = dict.fromkeys(unit.exit for unit in units[:-1])
    handles = [learner.model.get_submodule(p).register_forward_hook(hook) for p in paths]
    try:
        with preserved(learner.model), torch.enable_grad():
            z = forward(learner.model, x)
        check([z], len(units) - 1)
    finally:
        for handle in handles:
            handle.remove()
    return border


# --- from process to process --------------------------------------------------------------------

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_DIMS = 6  #: axes a tensor may have
_MOST = 8  #: tensors that may be sent at once


class _Link:
    """Tensors to the next process of a pipeline and from the one before, shapes included."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None, ahead: int) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self.rank, self.group, self.ahead = rank, group, ahead
        self.sent, self.waited = 0, 0.0
        self._pending: deque[list[tuple[Any, Tensor]]] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To the next process. Waits while that one is ``ahead`` batches behind."""
        if len(tensors) > _MOST or any(t.ndim > _DIMS for t in tensors):
            raise ValueError(
                f"a unit at the border of two processes may hand on {_MOST} tensors of {_DIMS} "
                f"axes at most, got {[tuple(t.shape) for t in tensors]}"
            )
        head = torch.zeros(1 + _MOST * (3 + _DIMS), dtype=torch.int64)
        head[0] = len(tensors)
        parts = [head]
        for i, tensor in enumerate(tensors):
            last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            entry = [_DTYPES.index(tensor.dtype), int(last), tensor.ndim, *tensor.shape]
            at = 1 + i * (3 + _DIMS)
            head[at : at + len(entry)] = torch.tensor(entry)
            parts.append(tensor.permute(0, 2, 3, 1) if last else tensor.contiguous())
        to = self.rank + 1
        self._pending.append([(dist.isend(p, group=self.group, group_dst=to), p) for p in parts])
        self.sent += sum(p.numel() * p.element_size() for p in parts)
        while len(self._pending) > self.ahead:
            for work, _ in self._pending.popleft():
                work.wait()

    def receive(self) -> list[Tensor]:
        """From the process before, in the order sent."""
        started = time.perf_counter()
        head = torch.zeros(1 + _MOST * (3 + _DIMS), dtype=torch.int64)
        self._receive(head)
        numbers = head.tolist()
        tensors = []
        for i in range(numbers[0]):
            at = 1 + i * (3 + _DIMS)
            dtype, last, ndim = numbers[at : at + 3]
            shape = numbers[at + 3 : at + 3 + ndim]
            if last:
                shape = [shape[0], shape[2], shape[3], shape[1]]
            tensor = torch.empty(shape, dtype=_DTYPES[dtype])
            self._receive(tensor)
            tensors.append(tensor.permute(0, 3, 1, 2) if last else tensor)
        self.waited += time.perf_counter() - started
        return tensors

    def _receive(self, tensor: Tensor) -> None:
        try:
            dist.recv(tensor, group=self.group, group_src=self.rank - 1)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank - 1}, which trains the units before, sent nothing: it has "
                f"ended or hangs ({error})"
            ) from error


def _agree(numbers: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """Those of the first process, on all."""
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(values, group=group, group_src=0)
    return list(values.tolist())


def _exchange(
    states: Mapping[str, Mapping[str, Any]] | None, rank: int, group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Optimizer states by parameter that process ``rank`` has, on all: JSON and plain tensors."""
    tensors: list[Tensor] = []
    text = b""
    if states is not None:
        content: dict[str, Any] = {}
        for name, state in states.items():
            content[name] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors.append(value.detach().contiguous())
                    value = {"dtype": _DTYPES.index(value.dtype), "shape": list(value.shape)}
                content[name][key] = value
        text = json.dumps(content).encode()
    size = torch.tensor([len(text)])
    dist.broadcast(size, group=group, group_src=rank)
    letters = (
        torch.tensor(list(text), dtype=torch.uint8)
        if text
        else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(letters, group=group, group_src=rank)
    found: dict[str, dict[str, Any]] = json.loads(bytes(letters.tolist()).decode())
    given = iter(tensors)
    for state in found.values():
        for key, value in state.items():
            if isinstance(value, dict):
                tensor = next(given, None)
                if tensor is None:
                    tensor = torch.empty(value["shape"], dtype=_DTYPES[value["dtype"]])
                dist.broadcast(tensor, group=group, group_src=rank)
                state[key] = tensor
    return found


def _from_last(z: Tensor | None, last: int, group: dist.ProcessGroup | None) -> Tensor:
    """The output, which the last process has, on all."""
    head = torch.zeros(2 + _DIMS, dtype=torch.int64)
    if z is not None:
        entry = torch.tensor([_DTYPES.index(z.dtype), z.ndim, *z.shape])
        head[: len(entry)] = entry
    dist.broadcast(head, group=group, group_src=last)
    dtype, ndim, *shape = head.tolist()
    z = torch.empty(shape[:ndim], dtype=_DTYPES[dtype]) if z is None else z.contiguous()
    dist.broadcast(z, group=group, group_src=last)
    return z


# --- samples side by side -----------------------------------------------------------------------


class DataParallel:
    """``learner`` on every process, each with samples of its own; gradients are averaged.

    The average of a unit's gradients is under way while the next unit runs. Weights and feedback
    start as those of the first process and stay alike everywhere, and so do ranks: call
    ``reduce_rank`` on every process. Batch norms take the statistics of their own process.

    It equals one process on the whole batch where the loss is a mean over samples and batches are
    of one size. A loss that compares samples (similarity) compares those of one process.
    """

    def __init__(self, learner: Learner, *, group: dist.ProcessGroup | None = None) -> None:
        self.learner, self.group = learner, group
        self.size = dist.get_world_size(group)
        times = Counter(name for unit in learner.units for name in unit.parameters)
        model = learner.model
        #: Weights of several units: their gradients are complete when the last of these is done.
        self._shared = {id(model.get_parameter(name)) for name, n in times.items() if n > 1}
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._reduced: set[int] = set()
        self.sent = 0  #: bytes of gradients handed to the process group so far
        with torch.no_grad():
            for part in (model, learner.feedback):
                for tensor in (*part.parameters(), *part.buffers()):
                    values = tensor.detach().contiguous()
                    dist.broadcast(values, group=group, group_src=0)
                    tensor.copy_(values)
        learner._retired = lambda unit, parameters: self._reduce(
            [p for p in parameters if id(p) not in self._shared]
        )

    def step(self, x: Any, y: Tensor) -> StepReport:
        """Learn from this process's share of the batch. The report is of this share."""
        learner = self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        report = learner.backward(x, y)
        names = (*learner.model.parameters(), *learner.feedback.parameters())
        self._reduce([p for p in names if id(p) not in self._reduced])
        for work, flat, parameters in self._pending:
            work.wait()
            gradients = torch.split(flat.div_(self.size), [p.numel() for p in parameters])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(gradient.view_as(parameter.grad))
        self._pending.clear()
        self._reduced.clear()
        learner.update()
        return report

    def _reduce(self, parameters: Sequence[Tensor]) -> None:
        """Start to sum gradients over the processes."""
        own = [p for p in parameters if p.grad is not None]
        self._reduced.update(map(id, own))
        if own:
            flat = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
            self.sent += flat.numel() * flat.element_size()
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self._pending.append((work, flat, own))
