"""Which parameters belong to which unit: a trial run shows what each unit's output depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .._structures import taken_apart
from .._tracing import watching
from .cuts import hooked
from .forward import forward, preserved
from .layout import Layout
from .units import OUTPUT, Feature, Unit


def reached(outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The ``parameters`` that ``outputs`` depend on."""
    found = leaves_of(outputs)
    return [p for p in parameters if p in found]


def leaves_of(outputs: Sequence[Tensor]) -> dict[Tensor, None]:
    """The leaf tensors that require grad and that ``outputs`` depend on, nearest first."""
    nodes = below(*(t.grad_fn for t in outputs if t.grad_fn is not None))
    return {v: None for n in nodes if (v := getattr(n, "variable", None)) is not None}


def depends(output: Tensor, on: Tensor) -> bool:
    """Whether ``output`` depends on the tensor ``on``."""
    return output is on or (output.grad_fn is not None and on.grad_fn in below(output.grad_fn))


@dataclass(frozen=True)
class _End:
    """A module call that ends a unit. ``values``: what it returned. ``leaves``: detached tensors,
    by the index of the value that they replace. ``copies``: of the leaves, which later modules
    got."""

    path: str
    call: int
    values: list[Any]
    leaves: dict[int, Tensor]
    copies: list[Tensor]


class Trial:
    """A forward pass in which the outputs of the modules ``exits`` are detached, so that each
    unit's autograd graph shows its parameters.

    After :meth:`run`: ``segments``, the units but for the last; ``output_parameters``, those of the
    last; ``shared``, a module whose graph two units have in common, or None, and ``owner``, the
    first of the two. An output that the network's output does not depend on is not taught, and what
    only it depends on belongs to no unit.
    """

    def __init__(self, model: nn.Module, exits: frozenset[str]) -> None:
        self.model, self.exits = model, exits
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.segments: list[Unit] = []
        self.output_parameters: tuple[str, ...] = ()
        self.shared: str | None = None
        self.owner = ""
        self._ends: list[_End] = []
        self._owners: dict[Node, str] = {}
        self._producers: dict[Node, str] = {}
        self._alive: list[Any] = []

    def run(self, example: Any) -> Tensor:
        hooks = [
            m.register_forward_hook(self._hook(path)) for path, m in hooked(self.model).items()
        ]
        with watching(hooks), preserved(self.model), _unfrozen(self.model), torch.enable_grad():
            z = forward(self.model, example)
            if not z.requires_grad:
                raise ValueError(
                    "the output of model does not require a gradient, though parameters do: "
                    "forward runs under torch.no_grad or torch.inference_mode, or detaches it"
                )
            wanted = leaves_of([z])
            read = list[list[Tensor]]()
            for end in reversed(self._ends):
                read.append([end.values[i] for i, leaf in end.leaves.items() if leaf in wanted])
                wanted |= leaves_of(read[-1])
            for end, tensors in zip(self._ends, reversed(read), strict=True):
                self.segments.append(self._segment(end, tensors))
            self.output_parameters = self._parameters([z], OUTPUT)
        return z

    def finished(self, layouts: Sequence[Sequence[Layout]]) -> list[Unit]:
        """The units with the layouts of their features."""
        return [
            replace(
                unit,
                features=tuple(
                    Feature(f.index, layout.shape(f.shape), layout)
                    for f, layout in zip(unit.features, of_unit, strict=True)
                ),
            )
            for unit, of_unit in zip(self.segments, layouts, strict=True)
        ]

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():  # the streaming pass leaves such calls out as well
                return None
            values, again = taken_apart(output)
            tensors = {
                i: t
                for i, t in enumerate(values)
                if isinstance(t, Tensor) and t.grad_fn is not None
            }
            if path not in self.exits:
                for tensor in tensors.values():
                    assert tensor.grad_fn is not None
                    self._producers.setdefault(tensor.grad_fn, path)
                self._alive.append(tensors)
                return None
            call = sum(end.path == path for end in self._ends)
            fresh = {i: t.detach().requires_grad_() for i, t in tensors.items()}
            copies = {i: leaf.clone() for i, leaf in fresh.items()}
            self._ends.append(_End(path, call, values, fresh, list(copies.values())))
            return again([copies.get(i, value) for i, value in enumerate(values)])

        return hook

    def _segment(self, end: _End, read: list[Tensor]) -> Unit:
        """The unit that ends there, of whose outputs others ``read`` these."""
        path, call = end.path, end.call
        # The path alone could be the name of the last unit, or of a second call.
        unique = call == 0 and path != OUTPUT and "#" not in path
        parameters = self._parameters(read, path)
        floats = [t for t in end.values if isinstance(t, Tensor) and t.is_floating_point()]
        taught = self._taught(read, parameters) or floats[:1]
        return Unit(
            path if unique else f"{path}#{call}",
            path,
            call,
            parameters,
            tuple(
                Feature(i, tuple(value.shape))
                for i, value in enumerate(end.values)
                if any(value is tensor for tensor in taught)
            ),
            inplace=any(t._version > 0 for t in end.copies),
        )

    def _parameters(self, outputs: list[Tensor], unit: str) -> tuple[str, ...]:
        """Names of the trainable parameters that ``outputs`` of ``unit`` depend on. Notes a piece
        of graph that another unit has as well."""
        seen = below(*(t.grad_fn for t in outputs if t.grad_fn is not None))
        if any(node.name().startswith("CheckpointFunction") for node in seen):
            raise ValueError(
                "model uses torch.utils.checkpoint with use_reentrant=True, which hides what a "
                "unit depends on; pass use_reentrant=False"
            )
        found = {self.names[id(v)] for v in leaves_of(outputs) if id(v) in self.names}
        for node in seen:
            if self.shared is None and node in self._owners and self._leads_to_parameter(node):
                self.shared = self._producer_of(node)
                self.owner = self._owners[node]
        for node in seen:
            if not hasattr(node, "variable"):
                self._owners.setdefault(node, unit)
        return tuple(name for name in self.names.values() if name in found)

    def _taught(self, tensors: list[Tensor], parameters: tuple[str, ...]) -> list[Tensor]:
        """The first of ``tensors`` that depends on all ``parameters``, so that a loss on it trains
        them all; if there is none, several that together do."""
        taught, missing = [], set(parameters)
        for tensor in tensors:
            found = {self.names[id(v)] for v in leaves_of([tensor]) if id(v) in self.names}
            if found.issuperset(parameters):
                return [tensor]
            if found & missing:
                taught.append(tensor)
                missing -= found
        return taught

    def _leads_to_parameter(self, node: Node) -> bool:
        return any(id(getattr(n, "variable", None)) in self.names for n in below(node))

    def _producer_of(self, node: Node) -> str:
        """The module that made the nearest tensor that ``node`` depends on."""
        return next((self._producers[n] for n in below(node) if n in self._producers), "")


@contextlib.contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """Make frozen parameters require grad inside, so that units own them as well: they may be
    unfrozen later."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def below(*nodes: Node) -> list[Node]:
    """``nodes`` and all nodes of the graph that they depend on, nearest first."""
    queue = list(dict.fromkeys(nodes))
    seen = set(queue)
    for current in queue:
        for below, _ in current.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
    return queue
