"""The local step: a forward pass that teaches each unit as it goes, and forgets it.

At a unit's exit its output ``h`` is handed on as a fresh leaf, and the rule's loss on ``h`` joins
the unit's graph. Once the losses of ``horizon`` units more are there, the oldest of them retires:
signals travel from the newest unit back to it, a unit at a time, each unit's own loss adding to
what comes from beyond it. Its graph dies there. At any moment ``horizon + 1`` units hold
activations, and between retirements no signal is held: a unit's own is a loss away.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..autocast import outside_autocast
from .forward import first_tensor, forward
from .units import Plan, Unit

__all__ = ["Retire", "Teach", "stream"]

Teach = Callable[[Unit, Tensor], Tensor]
"""``(unit, h) -> loss``: the unit's own loss on its output ``h``, 0-dim, part of its graph."""

Retire = Callable[[Unit, list[Tensor], bool], None]
"""``(unit, heads, planned)``: take the unit's gradients, those of the 0-dim ``heads``, its own loss
and all that reaches it from units after it, in one backward pass. ``planned``: the exits before it
came in the plan's order, so that it is made of what the plan says; else control flow went another
way than for the example."""


class _Segment:
    """A unit in the window: its outputs, the leaves handed on for them, its own loss, and the
    signals that have just come in."""

    def __init__(
        self,
        unit: Unit,
        outputs: list[Tensor],
        leaves: list[Tensor],
        loss: Tensor,
        planned: bool,
    ) -> None:
        self.unit, self.outputs, self.leaves = unit, outputs, leaves
        self.loss, self.planned = loss, planned
        self.signals: list[list[Tensor]] = [[] for _ in outputs]

    def heads(self) -> list[Tensor]:
        """0-dim tensors whose gradients are those of the loss and of the signals, which go."""
        heads = [
            _Deliver.apply(output, [signal])  # type: ignore[no-untyped-call]
            for output, signals in zip(self.outputs, self.signals, strict=True)
            for signal in signals
        ]
        for signals in self.signals:
            signals.clear()
        return [self.loss, *heads] if self.loss.requires_grad else heads


class _Stream:
    def __init__(self, plan: Plan, horizon: int, teach: Teach, retire: Retire) -> None:
        self.units = {(unit.exit, unit.call): i for i, unit in enumerate(plan.units[:-1])}
        self.inplace = {unit.exit for unit in plan.units if unit.inplace}
        self.plan, self.next = plan, 0
        self.horizon, self.teach, self.retire = horizon, teach, retire
        self.window: deque[_Segment] = deque()
        self.calls: dict[str, int] = {}
        self.active = True

    def hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            # Recomputation (gradient checkpointing) runs modules again while a unit goes backward:
            # it has to meet the same cuts, and nothing else.
            return self.exit(path, output) if self.active else self.cut(path, output)[0]

        return hook

    def cut(self, path: str, output: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
        """What is handed on for ``output``, its tensors that require grad, and their leaves."""
        values, structure = tree_flatten(output)
        at = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
        outputs = [values[i] for i in at]
        leaves = [t.detach().requires_grad_(self.horizon > 0) for t in outputs]
        for i, leaf in zip(at, leaves, strict=True):
            values[i] = leaf.clone() if path in self.inplace and self.horizon > 0 else leaf
        return tree_unflatten(values, structure), outputs, leaves

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
        handed_on, outputs, leaves = self.cut(path, output)
        if not outputs:  # frozen, and so is all before it
            self.advance(index)
            return output
        feature = next((i for i, t in enumerate(outputs) if t is first_tensor(output)), 0)
        self.learn(index, outputs, leaves, feature)
        return handed_on

    def advance(self, index: int) -> bool:
        """Note that unit ``index`` ends; whether it was this one's turn."""
        planned, self.next = index == self.next, index + 1
        return planned

    def learn(self, index: int, outputs: list[Tensor], leaves: list[Tensor], feature: int) -> None:
        self.active = False
        unit, planned = self.plan.units[index], self.advance(index)
        # Whoever watches over what the model's own graph saves (checkpointing) need not see this.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            loss = self.teach(unit, outputs[feature])
        self.window.append(_Segment(unit, outputs, leaves, loss, planned))
        if len(self.window) > self.horizon:
            self.pop()
        self.active = True

    def pop(self) -> None:
        """Retire the oldest unit in the window, by all that reaches it from the others."""
        segments = list(self.window)
        with outside_autocast():
            for i in range(len(segments) - 1, 0, -1):
                _carry(segments[i], segments[:i])
            oldest = self.window.popleft()
            if heads := oldest.heads():
                self.retire(oldest.unit, heads, oldest.planned)


def _carry(segment: _Segment, upstream: list[_Segment]) -> None:
    """Carry all that ``segment`` has, its own signal included, to the units it took inputs from."""
    leaves = [(s.signals[i], leaf) for s in upstream for i, leaf in enumerate(s.leaves)]
    heads = segment.heads()
    if not heads or not leaves:
        return
    grads = torch.autograd.grad(
        heads, [leaf for _, leaf in leaves], retain_graph=True, allow_unused=True
    )
    for (signals, _), grad in zip(leaves, grads, strict=True):
        if grad is not None:
            signals.append(grad)


class _Deliver(torch.autograd.Function):
    """A 0-dim head on ``h`` whose gradient in ``h`` is the one tensor in ``signal``.

    Given to autograd as an argument, a signal, as large as ``h``, would live until the whole unit
    has gone backward; this way it dies where it has been used, before the unit's peak.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, signal: list[Tensor]) -> Tensor:
        ctx.signal = signal
        return h.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.signal.pop(), None


def stream(
    model: nn.Module, plan: Plan, x: Any, *, horizon: int, teach: Teach, retire: Retire
) -> Tensor:
    """One streaming pass over ``x``; returns the network's output, detached.

    ``teach`` is asked once for each unit as its output is computed, the output's own unit last;
    ``retire`` is called once for each unit, in order, when its graph is about to be dropped.
    """
    state = _Stream(plan, horizon, teach, retire)
    with _hooked(model, {path: state.hook(path) for path in plan.exits}), torch.enable_grad():
        z = forward(model, x)
        if z.requires_grad:
            state.learn(len(plan.units) - 1, [z], [], 0)
        state.active = False
        while state.window:
            state.pop()
    return z.detach()


@contextlib.contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    handles = [
        model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
