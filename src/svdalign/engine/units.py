"""Cutting a model into units, on an unchanged ``forward``.

A unit ends at an *exit*: a module whose output is handed on as a fresh leaf, so that no gradient
passes unless the engine carries it. Everything that the output depends on since the previous exits,
norms, embeddings, functional activations and skips included, belongs to the unit: this is read off
the autograd graph of a trial run, not off names.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from .forward import first_tensor, forward, preserved
from .layout import AS_IT_IS, Layout, layout_of

__all__ = ["OUTPUT", "Plan", "Unit", "Units", "make_plan", "reached"]

Units = str | int | Sequence[str] | Callable[[str, nn.Module], bool]

OUTPUT = "output"  #: name of the last unit, from the last exit to the network's output


@dataclass(frozen=True)
class Unit:
    """One piece of the network that learns on its own.

    ``name``: unique in its plan. ``exit``: path of the module whose output ends the unit, at its
    ``call``-th call (from 0) in a forward pass. ``parameters``: names of the parameters that its
    output depends on, frozen ones too. ``features_shape``: shape of that output for the example, as
    ``layout`` presents it to rules. ``inplace``: the model goes on to change the output in place,
    so that a copy has to be handed on.
    """

    name: str
    exit: str
    call: int
    parameters: tuple[str, ...]
    features_shape: tuple[int, ...]
    layout: Layout = AS_IT_IS
    inplace: bool = False


@dataclass(frozen=True)
class Plan:
    """The units in order of execution; the last one, :attr:`output`, is taught by the task itself.

    ``unreached``: trainable parameters that no unit's output depends on for the example.
    ``blocks``: paths of the residual or transformer blocks, or layers where there are none, with
    the norms and activations that share a module with one, in order of execution but for the last.
    """

    units: tuple[Unit, ...]
    output_shape: tuple[int, ...]
    unreached: tuple[str, ...]
    blocks: tuple[str, ...]

    @property
    def output(self) -> Unit:
        """The unit from the last exit to the network's output."""
        return self.units[-1]

    @property
    def exits(self) -> tuple[str, ...]:
        """Paths of the modules to hook, each once."""
        return tuple(dict.fromkeys(unit.exit for unit in self.units[:-1]))


def make_plan(model: nn.Module, units: Units, example: Any, *, whole: bool = False) -> Plan:
    """Cut ``model`` into units and assign its parameters.

    ``units``: ``"layer"`` ends a unit after every layer with a weight matrix and the norm,
    activation and pooling modules that follow it; ``"block"`` after every residual or transformer
    block (after every layer where there are none); ``"stage"`` after every run of blocks of one
    feature shape; an int after that many blocks; a list of module names after each of these; a
    callable ``(name, module) -> bool`` where it says so. ``example``: a batch the model can run on.
    ``whole``: a plan of one unit will do though the model has several layers; it is
    backpropagation.

    The layers that lead to the output belong to the output's own unit, which learns from the task.
    Raises ValueError for a specification that names no place to cut, for one that leaves a model of
    several layers in one piece (unless ``whole``), for a model whose units
    share a piece of their graphs that cannot be told apart, for a callable that ends a unit where
    the batch is not an axis of its own, and for checkpointing that hides a unit's graph.
    """
    if isinstance(units, list | tuple):
        units = _named(model, units)
    if isinstance(example, Tensor):
        example = example[:2]
    calls = _trace(model, example)
    exits = _exits(model, units, calls)
    outputs = [
        (c.path, c.module, tuple(c.output.shape)) for c in calls if isinstance(c.output, Tensor)
    ]
    known = {call.path for call in calls}
    for _ in range(2 * len(known) + 2):
        trial = _Trial(model, exits)
        z = trial.run(example)
        if trial.shared is not None:
            if trial.shared in exits or trial.shared not in known:
                raise ValueError(
                    f"units={units!r}: the inside of unit {trial.owner!r} is used again outside "
                    "it; choose larger units, for example units='block'"
                )
            exits = exits | {trial.shared}
            continue
        idle = {p for p in exits if not any(s.parameters for s in trial.segments if s.exit == p)}
        if not idle and exits and not trial.output_parameters:
            idle = {trial.segments[-1].exit}
        layouts = [
            layout_of(s.exit, s.features_shape, tuple(z.shape), outputs) for s in trial.segments
        ]
        odd = {
            s.exit: s for s, layout in zip(trial.segments, layouts, strict=True) if layout is None
        }
        if odd and callable(units):
            path, segment = next(iter(odd.items()))
            raise ValueError(
                f"units ends a unit at {path!r}, whose output of shape {segment.features_shape} "
                f"does not keep the batch of the network's output, {tuple(z.shape)}, as an axis"
            )
        if not idle and not odd:
            if not exits and not whole:
                _refuse_one_piece(model, units, calls)
            blocks = _in_order(calls, _with_what_follows(model, _layers(calls), calls))[:-1]
            return _plan(model, trial, [layout or AS_IT_IS for layout in layouts], z, blocks)
        exits = exits - idle - odd.keys()
    raise ValueError(
        f"units={units!r} does not settle on this model; pass a callable (name, module) -> bool"
    )


def _named(model: nn.Module, names: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """Ends units at the modules of these names."""
    known = [name for name, _ in model.named_modules() if name]
    if not names or (unknown := [name for name in names if name not in known]):
        what = f"no module {', '.join(map(repr, unknown))}" if names else "an empty list"
        raise ValueError(f"units must name modules of the model, got {what}; it has {known}")
    return lambda name, module: name in names


def _plan(
    model: nn.Module, trial: _Trial, layouts: Sequence[Layout], z: Tensor, blocks: Sequence[str]
) -> Plan:
    last = Unit(OUTPUT, "", 0, trial.output_parameters, tuple(z.shape))
    found = {name for unit in (*trial.segments, last) for name in unit.parameters}
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and n not in found]
    units = (*trial.finished(layouts), last)
    return Plan(units, tuple(z.shape), tuple(unreached), tuple(blocks))


def _refuse_one_piece(model: nn.Module, units: Units, calls: list[_Call]) -> None:
    """ValueError if ``model`` has more than one layer: the one unit would be backpropagation."""
    layers = _layers(calls)
    if len(layers) > 1:
        blocks = len(_in_order(calls, _blocks(model, layers)))
        raise ValueError(
            f"units={units!r} leaves this model of {len(layers)} layers, {blocks} blocks, in one "
            "piece, to be trained by backpropagation; choose smaller units, or horizon=None if "
            "that is wanted"
        )


def reached(outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of ``parameters`` that the graph of ``outputs`` leads to."""
    queue = [t.grad_fn for t in outputs if t.grad_fn is not None]
    found = {id(getattr(node, "variable", None)) for node in _below(*queue)}
    return [p for p in parameters if id(p) in found]


# --- where to cut -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A module call in the trace; tensors are kept alive so that identity means identity."""

    path: str
    module: nn.Module
    input: Tensor | None
    output: Any


def _trace(model: nn.Module, example: Any) -> list[_Call]:
    calls: list[_Call] = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            calls.append(_Call(path, module, first, output))

        return hook

    handles = [m.register_forward_hook(record(path)) for path, m in model.named_modules() if path]
    try:
        with preserved(model), torch.no_grad():
            forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _has_weight_matrix(module: nn.Module) -> bool:
    """Whether the module itself (not a child) multiplies by a matrix: embeddings only look up."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _exits(model: nn.Module, units: Units, calls: list[_Call]) -> frozenset[str]:
    layers = _layers(calls)
    if callable(units):
        paths = dict.fromkeys(call.path for call in calls)
        chosen = [p for p in paths if units(p, model.get_submodule(p))]
        if not chosen:
            raise ValueError("units chose no module: the callable returned False for every one")
        return frozenset(chosen)
    if units == "layer":
        bases = _in_order(calls, layers)
    elif units in ("block", "stage") or (isinstance(units, int) and not isinstance(units, bool)):
        bases = _in_order(calls, _blocks(model, layers))
        if isinstance(units, int):
            if units < 1:
                raise ValueError(f"units must be at least 1 block, got {units}")
            bases = bases[units - 1 :: units]
    else:
        raise ValueError(
            "units must be 'layer', 'block', 'stage', a whole number, a list of module names or a "
            f"callable, got {units!r}"
        )
    # A norm after a block most often is the next block's own first step: only layers have chains.
    ends = [_chain_end(p, calls) if p in layers else _last_call(p, calls) for p in bases]
    if units == "stage":
        # The layer's or block's own shape: the pooling that ends a stage belongs to it.
        shapes = [tuple(first_tensor(_last_call(p, calls).output).shape) for p in bases]
        ends = [e for i, e in enumerate(ends) if i + 1 == len(ends) or shapes[i] != shapes[i + 1]]
    return frozenset(end.path for end in ends)


def _layers(calls: list[_Call]) -> set[str]:
    """Paths of the modules that multiply by a matrix of their own."""
    layers = {call.path for call in calls if _has_weight_matrix(call.module)}
    # Where layers stand inside, an own matrix is a table (positions, a class token) beside them.
    return {p for p in layers if not any(_inside(other, p) for other in layers)}


def _in_order(calls: list[_Call], paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that were called, in order of execution, each once."""
    wanted = set(paths)
    return [path for path in dict.fromkeys(call.path for call in calls) if path in wanted]


def _inside(path: str, other: str) -> bool:
    return path.startswith(other + ".")


def _blocks(model: nn.Module, layers: set[str]) -> Iterator[str]:
    """Paths of the blocks: the innermost modules below which no list of further blocks stands."""

    def weights(path: str) -> int:
        return sum(p == path or _inside(p, path) for p in layers)

    def lists_blocks(path: str, module: nn.Module) -> bool:
        """Whether a Sequential or ModuleList at or below holds an element of several layers."""
        return any(
            weights(f"{path}.{name}.{child}" if name else f"{path}.{child}") > 1
            for name, m in module.named_modules()
            if isinstance(m, nn.Sequential | nn.ModuleList)
            for child, _ in m.named_children()
        )

    def descend(prefix: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            plain = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if path not in layers and (plain or lists_blocks(path, child)):
                yield from descend(path, child)
            elif weights(path):
                yield path

    return descend("", model)


def _with_what_follows(model: nn.Module, layers: set[str], calls: list[_Call]) -> Iterator[str]:
    """Paths of the blocks, each the outermost module with no layer beside those of the block."""
    called = {call.path for call in calls}
    for path in _blocks(model, layers):
        inside = {p for p in layers if p == path or _inside(p, path)}
        around = path
        while around := around.rpartition(".")[0]:
            if {p for p in layers if _inside(p, around)} != inside:
                break
            path = around if around in called else path
        yield path


def _last_call(path: str, calls: list[_Call]) -> _Call:
    return next(call for call in reversed(calls) if call.path == path)


def _chain_end(path: str, calls: list[_Call]) -> _Call:
    """The last of the norm, activation, pooling and dropout modules that alone follow ``path``.

    A chain link reads the output so far and nothing else does; it keeps the number of dimensions
    and shrinks the map at most like a 2 x 2 pooling, so that what is left is still features.
    """
    start = next(i for i, call in enumerate(calls) if call.path == path)
    end = calls[start]
    times = Counter(call.path for call in calls)
    if times[path] > 1:  # every call is to end a unit, and what follows each of them differs
        return end
    for i, call in enumerate(calls[start + 1 :], start + 1):
        if not isinstance(end.output, Tensor) or call.input is not end.output:
            continue
        plain = not any(_has_weight_matrix(module) for module in call.module.modules())
        same = isinstance(call.output, Tensor) and call.output.ndim == end.output.ndim
        # A link that works in place hands the same tensor on: what reads it later reads the link's.
        until = i if call.output is end.output else len(calls)
        readers = sum(
            c.input is end.output and next(c.module.children(), None) is None
            for c in calls[start + 1 : until + 1]
        )
        if not plain or not same or readers > 1 or times[call.path] > 1:
            break
        least = end.output.numel() / 4
        if end.output.ndim == 4:  # a 2 x 2 pooling leaves a last odd row or column out
            least = math.prod((*end.output.shape[:2], *(n // 2 for n in end.output.shape[2:])))
        if call.output.numel() < least:
            break
        start, end = i, call
    return end


# --- what belongs to each unit ------------------------------------------------------------------


class _Trial:
    """A forward pass cut at ``exits`` that reads each unit's parameters off its autograd graph."""

    def __init__(self, model: nn.Module, exits: frozenset[str]) -> None:
        self.model, self.exits = model, exits
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.segments: list[Unit] = []
        self.output_parameters: tuple[str, ...] = ()
        self.shared: str | None = None  # a module that two units' graphs have in common
        self.owner = ""
        self._counts: dict[str, int] = {}
        self._owners: dict[Node, str] = {}
        self._producers: dict[Node, str] = {}
        self._handed_on: list[list[Tensor]] = []
        self._alive: list[Any] = []

    def run(self, example: Any) -> Tensor:
        handles = [
            module.register_forward_hook(self._hook(path))
            for path, module in self.model.named_modules()
            if path
        ]
        try:
            with preserved(self.model), _unfrozen(self.model), torch.enable_grad():
                z = forward(self.model, example)
        finally:
            for handle in handles:
                handle.remove()
        self.output_parameters = self._parameters([z], OUTPUT)
        return z

    def finished(self, layouts: Sequence[Layout]) -> list[Unit]:
        """The units, now that the rest of the pass has shown who changes their outputs in place."""
        return [
            Unit(
                u.name, u.exit, u.call, u.parameters,
                layout.shape(u.features_shape), layout, inplace=any(t._version > 0 for t in ts),
            )
            for u, ts, layout in zip(self.segments, self._handed_on, layouts, strict=True)
        ]  # fmt: skip

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():  # the streaming pass does not see such calls either
                return None
            tensors = [
                t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None
            ]
            if path not in self.exits:
                for tensor in tensors:
                    assert tensor.grad_fn is not None
                    self._producers.setdefault(tensor.grad_fn, path)
                self._alive.append(tensors)
                return None
            call = self._counts.get(path, 0)
            self._counts[path] = call + 1
            parameters = self._parameters(tensors, path)
            # Unique: a module may be called as the output's unit is, or as another's second call.
            plain = call == 0 and path != OUTPUT and "#" not in path
            name = path if plain else f"{path}#{call}"
            feature = first_tensor(output)
            self.segments.append(Unit(name, path, call, parameters, tuple(feature.shape)))
            handed_on = tree_map(_copy_of_leaf, output)
            leaves = (t for t in tree_leaves(handed_on) if isinstance(t, Tensor))
            self._handed_on.append([t for t in leaves if t.requires_grad])
            return handed_on

        return hook

    def _parameters(self, outputs: list[Tensor], unit: str) -> tuple[str, ...]:
        """Names of the trainable parameters that ``outputs`` depend on; notes shared pieces."""
        seen = _below(*(t.grad_fn for t in outputs if t.grad_fn is not None))
        if any(node.name().startswith("CheckpointFunction") for node in seen):
            raise ValueError(
                "model uses torch.utils.checkpoint with use_reentrant=True, which hides what a "
                "unit depends on; pass use_reentrant=False"
            )
        found = {
            self.names[id(v)]
            for n in seen
            if (v := getattr(n, "variable", None)) is not None and id(v) in self.names
        }
        for node in seen:
            if self.shared is None and node in self._owners and self._leads_to_parameter(node):
                self.shared = self._producer_of(node)
                self.owner = self._owners[node]
        for node in seen:
            if not hasattr(node, "variable"):
                self._owners.setdefault(node, unit)
        return tuple(name for name in self.names.values() if name in found)

    def _leads_to_parameter(self, node: Node) -> bool:
        return any(id(getattr(n, "variable", None)) in self.names for n in _below(node))

    def _producer_of(self, node: Node) -> str:
        """The module whose output is nearest below ``node``."""
        return next((self._producers[n] for n in _below(node) if n in self._producers), "")


@contextlib.contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """Units do not depend on what is frozen at the moment, so that it can be thawed later."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _below(*nodes: Node) -> list[Node]:
    """``nodes`` and all that they lead to, nearest first."""
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
