"""One forward pass in which each unit learns as soon as its output, and those of the next
``horizon`` units, have been computed.

Where a unit ends, its output ``h`` is detached from its graph before the next unit reads it, and
the rule's loss on ``h`` is added to the unit's graph. The units whose graphs are still alive form a
window of at most ``horizon + 1`` units. When one more unit has run, the oldest leaves the window:
gradients travel from the newest unit back to the oldest, one unit at a time, each unit adding that
of its own loss; then the oldest unit's graph is freed.

The window keeps no activations itself. It keeps the places (edges) in the autograd graph where
gradients leave a unit and enter the one before; operations that need ``h`` in their backward save
it themselves.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._autocast import outside_autocast
from .._lazy import LazyTensor, reads_by_parts
from .._operations import saving_as_usual
from .._structures import leaves, taken_apart
from .._tracing import temporary, untraced
from .forward import forward
from .units import Plan, Unit

UnitLoss = Callable[[Unit, dict[int, Tensor]], Tensor]
"""``(unit, {i: h}) -> loss``: the unit's own loss on its ``i``-th features ``h`` (those that are
not frozen), 0-dim, part of its graph."""

UnitBackward = Callable[[Unit, list[Tensor], bool], None]
"""``(unit, heads, planned)``: run the unit's backward pass from the 0-dim tensors ``heads``, which
stand for its own loss and for the gradients that reach it from later units. ``planned``: the units
before it ended in the plan's order, so that its parameters are those in the plan; otherwise control
flow went another way than for the example."""


class _Segment:
    """A unit in the window, with its own loss.

    ``edges``: where the gradients of its outputs arrive, in the graphs of later units. ``signals``:
    the gradients that have arrived and are not yet passed on, for each output. ``ports``: where
    they enter the unit's own graph.
    """

    def __init__(
        self, unit: Unit, outputs: list[Tensor], edges: list[GradientEdge], planned: bool
    ) -> None:
        self.unit, self.edges, self.planned = unit, edges, planned
        self.outputs, self.ports = outputs, list[Tensor]()
        self.signals: list[list[Tensor]] = [[] for _ in edges]
        if edges:
            entered = [_Port.apply(h, s) for h, s in zip(outputs, self.signals, strict=True)]  # type: ignore[no-untyped-call]
            self.outputs, self.ports = map(list, zip(*entered, strict=True))

    def learn(self, unit_loss: UnitLoss, features: dict[int, int]) -> None:
        """Add the unit's own loss to its graph. ``features``: the outputs that the rule reads, by
        the number of the feature."""
        self.loss = unit_loss(self.unit, {i: self.outputs[at] for i, at in features.items()})
        self.outputs.clear()  # frees them

    def heads(self) -> list[Tensor]:
        """0-dim tensors from which a backward pass gives the gradients of the loss and of the
        signals; that pass uses the signals up."""
        heads = [port for port, signals in zip(self.ports, self.signals, strict=True) if signals]
        return [self.loss, *heads] if self.loss.requires_grad else heads


class _Stream:
    def __init__(
        self,
        plan: Plan,
        horizon: int,
        unit_loss: UnitLoss,
        unit_backward: UnitBackward,
        leave: Callable[[Any], None] | None,
    ) -> None:
        self.leave = leave
        self.units = {(unit.exit, unit.call): i for i, unit in enumerate(plan.units[:-1])}
        self.inplace = {unit.exit for unit in plan.units if unit.inplace}
        self.plan, self.next = plan, 0
        self.horizon, self.unit_loss, self.unit_backward = horizon, unit_loss, unit_backward
        self.window: deque[_Segment] = deque()
        self.calls: dict[str, int] = {}
        self.active = True
        self.anchor = torch.zeros((), requires_grad=True)  # makes detached outputs require grad

    def hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            # Gradient checkpointing runs modules again during a unit's backward pass. Their outputs
            # have to be detached as before, and nothing else may happen.
            if not self.active:
                return self.cut(path, output)[0]
            handed_on = self.exit(path, output)
            if self.leave is not None and self.next == len(self.units):
                self.leave(handed_on)
                raise Left
            return handed_on

        return untraced(hook)

    def cut(self, path: str, output: Any) -> tuple[Any, list[Tensor], list[GradientEdge]]:
        """Detach ``output``. Returns what the next unit reads in its place, the tensors of
        ``output`` that require grad, and the edges where their gradients will arrive (none at
        horizon 0)."""
        values, again = taken_apart(output)
        outputs, edges = [], []
        for i, value in enumerate(values):
            if not (isinstance(value, Tensor) and value.grad_fn is not None):
                continue  # a parameter among the outputs belongs to the unit that reads it
            outputs.append(value)
            values[i] = value.detach()
            if self.horizon > 0:
                values[i] = _Entry.apply(self.anchor, values[i])  # type: ignore[no-untyped-call]
                edges.append(get_gradient_edge(values[i]))
                if path in self.inplace:
                    values[i] = values[i].clone()
        return again(values), outputs, edges

    def exit(self, path: str, output: Any) -> Any:
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        index = self.units.get((path, call))
        if index is None:
            raise RuntimeError(
                f"module {path!r} was called {call + 1} times in this pass, but {call} times on "
                "the example batch: a model whose control flow depends on the data needs units "
                "around it, for example units=callable naming the enclosing module"
            )
        handed_on, outputs, edges = self.cut(path, output)
        values = leaves(output)
        at = {id(tensor): place for place, tensor in enumerate(outputs)}
        taught = [id(values[feature.index]) for feature in self.plan.units[index].features]
        features = {i: at[tensor] for i, tensor in enumerate(taught) if tensor in at}
        if not features:  # frozen, as is everything before it, or nothing reads it
            self.advance(index)
            return handed_on
        self.learn(index, outputs, edges, features)
        return handed_on

    def advance(self, index: int) -> bool:
        """Note that unit ``index`` ends. Returns whether the plan has it end now."""
        planned, self.next = index == self.next, index + 1
        return planned

    def learn(
        self, index: int, outputs: list[Tensor], edges: list[GradientEdge], features: dict[int, int]
    ) -> None:
        self.active = False
        unit, planned = self.plan.units[index], self.advance(index)
        with saving_as_usual():  # a checkpoint around the unit is for the model's own graph
            segment = _Segment(unit, outputs, edges, planned)
            segment.learn(self.unit_loss, features)
            self.window.append(segment)
            if len(self.window) > self.horizon:
                self.pop()
        self.active = True

    def pop(self) -> None:
        """Bring all gradients to the oldest unit, run its backward pass, and drop it."""
        segments = list(self.window)
        with outside_autocast():
            for i in range(len(segments) - 1, 0, -1):
                _carry(segments[i], segments[:i])
            oldest = self.window.popleft()
            if heads := oldest.heads():
                self.unit_backward(oldest.unit, heads, oldest.planned)


def _carry(segment: _Segment, upstream: list[_Segment]) -> None:
    """Pass the gradients of ``segment``, its own loss's included, on to the units that it reads."""
    edges = [edge for s in upstream for edge in s.edges]
    heads = segment.heads()
    grads: tuple[Tensor | None, ...] = (None,) * len(edges)
    if heads and edges:
        grads = torch.autograd.grad(heads, edges, retain_graph=True, allow_unused=True)
    for signals in segment.signals:
        signals.clear()  # some may not lead to an edge; the next pop finds them all again
    inboxes = [signals for s in upstream for signals in s.signals]
    known: set[int] = set()
    for signals, grad in zip(inboxes, grads, strict=True):
        if grad is not None:
            signals.append(_own(grad, known))


def _own(grad: Tensor, known: set[int]) -> Tensor:
    """``grad``, or a copy of it if other tensors share its memory or it overlaps itself, so that it
    can be added to in place. ``known``: addresses of memory that is in use."""
    if isinstance(grad, LazyTensor):
        return grad
    dense = grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)
    pointer = grad.untyped_storage().data_ptr()
    if dense and pointer not in known:
        known.add(pointer)
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def _add(signal: Tensor, other: Tensor) -> Tensor:
    """Their sum, written into ``signal`` unless that is lazy."""
    return signal + other if isinstance(signal, LazyTensor) else signal.add_(other)


@reads_by_parts
class _Entry(torch.autograd.Function):
    """The identity on ``h``, which gives autograd an edge to return the gradient of ``h`` at. (A
    leaf tensor would do too, but it would keep ``h`` alive.)"""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, h: Tensor) -> Tensor:
        return h.detach()  # ``h`` itself would become a view, which cannot be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


@reads_by_parts
class _Port(torch.autograd.Function):
    """The identity on ``h``, and a 0-dim head. Its backward pass adds ``signals``, the gradients
    from later units, to the gradient of ``h``. The head makes it run where nothing else needs
    ``h``; the value of the head's gradient does not matter.

    Passed to autograd as an argument, a signal would stay in memory until the whole unit's backward
    pass is over. Added here, it is freed as soon as it has been used.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, signals: list[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.signals = signals
        return h.detach(), torch.zeros((), dtype=h.dtype, device=h.device)

    @staticmethod
    def backward(ctx: Any, total: Tensor | None, head: Tensor | None) -> tuple[Tensor | None, None]:
        while ctx.signals:
            signal = ctx.signals.pop()
            total = signal if total is None else _add(signal, total)
        return total, None


def stream(
    model: nn.Module,
    plan: Plan,
    x: Any,
    *,
    horizon: int,
    unit_loss: UnitLoss,
    unit_backward: UnitBackward,
    leave: Callable[[Any], None] | None = None,
) -> Tensor | None:
    """One streaming pass over ``x``; returns the network's output, detached.

    ``unit_loss`` is called for each unit once its output is computed, the output's own unit last.
    ``unit_backward`` is called for each unit, in order, before its graph is freed. ``leave``: is
    given the output of the last unit before the network's output; the pass ends there and returns
    None.
    """
    state = _Stream(plan, horizon, unit_loss, unit_backward, leave)
    hooks = [
        model.get_submodule(path).register_forward_hook(state.hook(path)) for path in plan.exits
    ]
    with temporary(hooks), torch.enable_grad():
        z: Tensor | None = None
        with contextlib.suppress(Left):
            z = forward(model, x)
        if z is not None and z.requires_grad:
            state.learn(len(plan.units) - 1, [z], [], {0: 0})
        state.active = False
        while state.window:
            state.pop()
    return None if z is None else z.detach()


class Left(BaseException):
    """Ends a pass early. No ``except Exception`` of the model's own stops it."""
