"""Where units end, decided from the module calls that one forward pass records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._structures import leaves
from .._tracing import watching
from .forward import forward, preserved

Units = str | int | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Call:
    """A module call. Its tensors stay alive, so that no two of them share an ``id``. ``versions``:
    how often the input had been changed in place before the call, and the output after it."""

    path: str
    module: nn.Module
    input: Tensor | None
    output: Any
    versions: tuple[int, int] = (0, 0)


def hooked(model: nn.Module) -> dict[str, nn.Module]:
    """The modules after which a unit can end, by path: all below ``model`` but for those that
    compute a parametrized weight, and those compiled by ``torch.jit``, which take no hooks."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            inside.add(module)
        elif parametrize.is_parametrized(module):
            inside.update(module.parametrizations.modules())  # type: ignore[union-attr]
    return {path: m for path, m in model.named_modules() if path and m not in inside}


def trace(model: nn.Module, example: Any) -> list[Call]:
    """The module calls of one run over ``example``, in order."""
    calls: list[Call] = []
    before: list[int] = []  # of the calls that are under way

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.append(_version(args[0]) if args else 0)

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            calls.append(Call(path, module, first, output, (before.pop(), _version(output))))

        return hook

    watched = hooked(model)
    hooks = [m.register_forward_hook(record(path)) for path, m in watched.items()]
    hooks += [m.register_forward_pre_hook(note) for m in watched.values()]
    with watching(hooks), preserved(model):
        try:
            with torch.no_grad():
                forward(model, example)
        except RuntimeError:  # it may take gradients itself, as a force field does
            calls.clear()
            before.clear()
            forward(model, example)
    return calls


def _version(value: Any) -> int:
    """How often a tensor has been changed in place; of anything else 0."""
    known = isinstance(value, Tensor) and not value.is_inference()
    return value._version if known else 0


def _has_weight_matrix(module: nn.Module) -> bool:
    """Whether the module itself, not a child, multiplies by a matrix; embeddings do not."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    return any(p.ndim >= 2 for p in own)


def exits(model: nn.Module, units: Units, calls: list[Call]) -> frozenset[str]:
    """Paths of the modules that units end with; ``units`` as in :func:`make_plan`."""
    found = layers(calls)
    if callable(units):
        paths = dict.fromkeys(call.path for call in calls)
        chosen = [p for p in paths if units(p, model.get_submodule(p))]
        if not chosen:
            raise ValueError("units chose no module: the callable returned False for every one")
        return frozenset(chosen)
    if units == "layer":
        bases = in_order(calls, found)
    elif units in ("block", "stage") or (isinstance(units, int) and not isinstance(units, bool)):
        bases = in_order(calls, blocks(model, found))
        if isinstance(units, int):
            if units < 1:
                raise ValueError(f"units must be at least 1 block, got {units}")
            bases = bases[units - 1 :: units]
    else:
        raise ValueError(
            "units must be 'layer', 'block', 'stage', 'balanced', 'balanced-3' (of any number), a "
            f"whole number, a list of module names or a callable, got {units!r}"
        )
    # A norm after a block is mostly the first step of the next block, so only units that end at a
    # layer take in what follows.
    ends = [_chain_end(p, calls) if p in found else _last_call(p, calls) for p in bases]
    if units == "stage":
        # The shape before what follows the layer: pooling that ends a stage belongs to the stage.
        shapes = [
            [t.shape for t in leaves(_last_call(p, calls).output) if isinstance(t, Tensor)][:1]
            for p in bases
        ]
        ends = [e for i, e in enumerate(ends) if i + 1 == len(ends) or shapes[i] != shapes[i + 1]]
    return frozenset(end.path for end in ends)


def layers(calls: Sequence[Call]) -> set[str]:
    """Paths of the modules that multiply by a matrix of their own."""
    found = {call.path for call in calls if _has_weight_matrix(call.module)}
    # A module with layers inside has a matrix of its own for positions or a class token.
    return {p for p in found if not any(_inside(other, p) for other in found)}


def in_order(calls: Sequence[Call], paths: Iterable[str]) -> list[str]:
    """The ``paths`` that were called, in order of execution, each once."""
    wanted = set(paths)
    return [path for path in dict.fromkeys(call.path for call in calls) if path in wanted]


def _inside(path: str, other: str) -> bool:
    return path.startswith(other + ".")


def blocks(model: nn.Module, layers: set[str]) -> Iterator[str]:
    """Paths of the blocks: the outermost modules that hold layers but no list of further blocks."""

    def weights(path: str) -> int:
        return sum(p == path or _inside(p, path) for p in layers)

    def lists_blocks(path: str, module: nn.Module) -> bool:
        """Whether a Sequential or ModuleList in ``module`` has an element with several layers."""
        return any(
            weights(f"{path}.{name}.{child}" if name else f"{path}.{child}") > 1
            for name, m in module.named_modules()
            if isinstance(m, nn.Sequential | nn.ModuleList)
            for child, _ in m.named_children()
        )

    def descend(prefix: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            container = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if path not in layers and (container or lists_blocks(path, child)):
                yield from descend(path, child)
            elif weights(path):
                yield path

    return descend("", model)


def blocks_and_neighbours(
    model: nn.Module, layers: set[str], calls: Sequence[Call]
) -> Iterator[str]:
    """Paths of the blocks, or of the outermost modules around them that add no further layer."""
    called = {call.path for call in calls}
    for path in blocks(model, layers):
        inside = {p for p in layers if p == path or _inside(p, path)}
        around = path
        while around := around.rpartition(".")[0]:
            if {p for p in layers if _inside(p, around)} != inside:
                break
            path = around if around in called else path
        yield path


def _last_call(path: str, calls: list[Call]) -> Call:
    return next(call for call in reversed(calls) if call.path == path)


def _chain_end(path: str, calls: list[Call]) -> Call:
    """The last of the norm, activation, pooling and dropout modules that follow ``path`` in a
    chain.

    Each is the only reader of the output before it, which nothing has changed since, keeps the
    number of axes, and shrinks a map no more than a 2 x 2 pooling does, so that the result is still
    a map of features.
    """
    start = next(i for i, call in enumerate(calls) if call.path == path)
    end = calls[start]
    times = Counter(call.path for call in calls)
    if times[path] > 1:  # every call ends a unit, and different modules follow each of them
        return end
    for i, call in enumerate(calls[start + 1 :], start + 1):
        if not isinstance(end.output, Tensor) or call.input is not end.output:
            continue
        if call.versions[0] != end.versions[1]:  # a skip has been added in place
            continue
        has_layers = any(_has_weight_matrix(module) for module in call.module.modules())
        same = isinstance(call.output, Tensor) and call.output.ndim == end.output.ndim
        # A module that works in place returns the same tensor: later readers read its output.
        until = i if call.output is end.output else len(calls)
        readers = sum(
            c.input is end.output and next(c.module.children(), None) is None
            for c in calls[start + 1 : until + 1]
        )
        if has_layers or not same or readers > 1 or times[call.path] > 1:
            break
        least = end.output.numel() / 4
        if end.output.ndim == 4:  # a 2 x 2 pooling drops an odd last row or column
            least = math.prod((*end.output.shape[:2], *(n // 2 for n in end.output.shape[2:])))
        if call.output.numel() < least:
            break
        start, end = i, call
    return end
