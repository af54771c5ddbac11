"""Which parameters belong to which unit: a trial run shows what each unit's output depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from .._tracing import temporary
from .cuts import hooked
from .forward import first_tensor, forward, preserved
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


class Trial:
    """A forward pass in which the outputs of the modules ``exits`` are detached, so that each
    unit's autograd graph shows its parameters.

    After :meth:`run`: ``segments``, the units but for the last; ``output_parameters``, those of the
    last; ``shared``, a module whose graph two units have in common, or None, and ``owner``, the
    first of the two.
    """

    def __init__(self, model: nn.Module, exits: frozenset[str]) -> None:
        self.model, self.exits = model, exits
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.segments: list[Unit] = []
        self.output_parameters: tuple[str, ...] = ()
        self.shared: str | None = None
        self.owner = ""
        self._counts: dict[str, int] = {}
        self._owners: dict[Node, str] = {}
        self._producers: dict[Node, str] = {}
        self._handed_on: list[list[Tensor]] = []
        self._alive: list[Any] = []

    def run(self, example: Any) -> Tensor:
        hooks = [
            m.register_forward_hook(self._hook(path)) for path, m in hooked(self.model).items()
        ]
        with temporary(hooks), preserved(self.model), _unfrozen(self.model), torch.enable_grad():
            z = forward(self.model, example)
        if not z.requires_grad:
            raise ValueError(
                "the output of model does not require a gradient, though parameters do: forward "
                "runs under torch.no_grad or torch.inference_mode, or detaches it"
            )
        self.output_parameters = self._parameters([z], OUTPUT)
        return z

    def finished(self, layouts: Sequence[Sequence[Layout]]) -> list[Unit]:
        """The units, with ``layouts`` for their features, and ``inplace`` where the rest of the
        pass changed their output."""
        return [
            replace(
                unit,
                features=tuple(
                    Feature(f.index, layout.shape(f.shape), layout)
                    for f, layout in zip(unit.features, of_unit, strict=True)
                ),
                inplace=any(t._version > 0 for t in handed_on),
            )
            for unit, handed_on, of_unit in zip(
                self.segments, self._handed_on, layouts, strict=True
            )
        ]

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():  # the streaming pass leaves such calls out as well
                return None
            leaves = tree_leaves(output)
            tensors = [t for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None]
            if path not in self.exits:
                for tensor in tensors:
                    assert tensor.grad_fn is not None
                    self._producers.setdefault(tensor.grad_fn, path)
                self._alive.append(tensors)
                return None
            call = self._counts.get(path, 0)
            self._counts[path] = call + 1
            parameters = self._parameters(tensors, path)
            # The path alone could be the name of the last unit, or of a second call.
            unique = call == 0 and path != OUTPUT and "#" not in path
            name = path if unique else f"{path}#{call}"
            taught = self._taught(tensors, parameters) or [first_tensor(output)]
            features = tuple(
                Feature(i, tuple(leaf.shape))
                for i, leaf in enumerate(leaves)
                if any(leaf is tensor for tensor in taught)
            )
            self.segments.append(Unit(name, path, call, parameters, features))
            handed_on = tree_map(_copy_of_leaf, output)
            copies = (t for t in tree_leaves(handed_on) if isinstance(t, Tensor))
            self._handed_on.append([t for t in copies if t.requires_grad])
            return handed_on

        return hook

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
        if len(tensors) < 2:
            return tensors
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


def _copy_of_leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_().clone()
    return value
