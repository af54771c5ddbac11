"""The local step: a forward pass that teaches each unit as it goes, and forgets it.

At a unit's exit its output ``h`` is replaced by a fresh leaf, its teaching signal ``delta`` at
``h`` is found, carried at most ``horizon`` units upstream, and the unit that has then received
everything it will receive gets its gradients. Its graph dies there. At any moment ``horizon + 1``
units hold activations.
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
"""``(unit, h) -> delta``: the teaching signal at the unit's output, of its shape."""

Retire = Callable[[Unit, list[Tensor], bool], None]
"""``(unit, heads, planned)``: everything that will reach the unit has: take its gradients, those of
the 0-dim ``heads``, in one backward pass. ``planned``: the exits before it came in the plan's
order, so that it is made of what the plan says; else control flow went another way than for the
example."""


class _Segment:
    """A unit in the window: its outputs, the leaves handed on for them, and the signals so far.

    Of a unit that is about to retire they are not summed: autograd does it in place where it can,
    in the unit's own backward pass.
    """

    def __init__(
        self, unit: Unit, outputs: list[Tensor], leaves: list[Tensor], planned: bool
    ) -> None:
        self.unit, self.outputs, self.leaves, self.planned = unit, outputs, leaves, planned
        self.signals: list[list[Tensor]] = [[] for _ in outputs]

    def receive(self, signals: list[Tensor | None]) -> None:
        for received, signal in zip(self.signals, signals, strict=True):
            if signal is not None:
                received.append(signal)

    def settle(self) -> None:
        """Sum what has arrived so far."""
        self.signals = [[sum(s[1:], s[0])] if len(s) > 1 else s for s in self.signals]


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
        segment = _Segment(self.plan.units[index], outputs, leaves, self.advance(index))
        self.window.append(segment)
        self.receive(segment, feature)
        if len(self.window) > self.horizon:
            self.pop()
        for waiting in self.window:
            waiting.settle()
        self.active = True

    def receive(self, segment: _Segment, feature: int) -> None:
        """Teach the newest unit, and carry its signal upstream."""
        # Whoever watches over what the model's own graph saves (checkpointing) need not see this.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            delta = self.teach(segment.unit, segment.outputs[feature])
        own: list[Tensor | None] = [None] * len(segment.outputs)
        own[feature] = delta
        segment.receive(own)
        with outside_autocast():
            self.carry(own)

    def carry(self, own: list[Tensor | None]) -> None:
        """Carry the newest unit's own signal upstream, to every unit left in the window."""
        segments = list(self.window)
        travelling: dict[int, list[Tensor | None]] = {len(segments) - 1: own}
        for i in range(len(segments) - 1, 0, -1):
            signals = travelling.get(i)
            if signals is None:
                continue
            upstream = segments[:i]  # the window is no longer than the horizon allows
            leaves = [leaf for segment in upstream for leaf in segment.leaves]
            arrived = iter(_vjp(segments[i].outputs, signals, leaves))
            for segment in upstream:
                grads = [next(arrived) for _ in segment.leaves]
                if all(g is None for g in grads):
                    continue
                segment.receive(grads)
                j = segments.index(segment)
                before = travelling.get(j, [None] * len(grads))
                travelling[j] = [_sum(a, b) for a, b in zip(before, grads, strict=True)]

    def pop(self) -> None:
        segment = self.window.popleft()
        held = [
            (output, [signal])
            for output, signals in zip(segment.outputs, segment.signals, strict=True)
            for signal in signals
        ]
        segment.signals.clear()
        with outside_autocast():
            heads = [_Deliver.apply(output, signal) for output, signal in held]  # type: ignore[no-untyped-call]
            self.retire(segment.unit, heads, segment.planned)


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


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _vjp(
    outputs: list[Tensor], signals: list[Tensor | None], inputs: list[Tensor]
) -> tuple[Tensor | None, ...]:
    pairs = [(t, s) for t, s in zip(outputs, signals, strict=True) if s is not None]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        [t for t, _ in pairs], inputs, [s for _, s in pairs], retain_graph=True, allow_unused=True
    )
