"""Which modules read a module's output, found by tracing ``forward``: so a model can be rewritten
without a change to what it computes."""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

_Hook = TypeVar("_Hook", bound=Callable[..., Any])

#: The attributes in which a module keeps the hooks that users register.
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


class _Tracer(fx.Tracer):
    def __init__(self, leaf: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaf) or super().is_leaf_module(m, module_qualified_name)


def followers(
    model: nn.Module, leaf: type[nn.Module] | tuple[type[nn.Module], ...] = ()
) -> dict[str, str]:
    """The pairs of modules of which the second is the only reader of the first one's output, as a
    dict from path to path.

    Both are called once, have no hooks and share no parameter with another module. ``leaf``: types
    of modules that are not looked into, beside those of ``torch.nn``. Raises an exception of any
    kind where the model cannot be traced (control flow that depends on the data).
    """
    graph = _Tracer(leaf).trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(n.target)]) for n in graph.nodes if n.op == "call_module")
    uses = Counter(id(p) for m in set(modules.values()) for p in m.parameters(recurse=False))
    # Modules of which ``forward`` reads a weight directly.
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    alone = {
        name
        for name, module in modules.items()
        if calls[id(module)] == 1
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and all(uses[id(p)] == 1 for p in module.parameters(recurse=False))
        and name not in read
    }
    found = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        if alone.issuperset((str(source.target), str(node.target))):
            found[str(source.target)] = str(node.target)
    return found


def layers_read(model: nn.Module, leaf: type[nn.Module]) -> set[nn.Module]:
    """The modules of type ``leaf`` of which ``model`` reads more than the output.

    That is a parameter, or what is computed from one such as ``weight``, in a ``forward`` that can
    be traced; and, traced or not, any attribute of a child that a module's code names, as in
    ``self.out.weight.dtype`` or ``self.out.in_features``. Where nothing can be traced, also those
    whose ``forward`` has parameters beside the input, such as ``output_size``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {
        modules[path]
        for owner, module in modules.items()
        if not isinstance(module, leaf)
        for path in _attributes_read(module, owner)
        if isinstance(modules.get(path), leaf)
    }
    try:
        graph = _Tracer(leaf).trace(model)
    except Exception:  # tracing runs the user's own code on stand-ins, which can fail in any way
        leaves = {m for m in modules.values() if isinstance(m, leaf)}
        return found | {m for m in leaves if len(inspect.signature(m.forward).parameters) > 1}
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "get_attr":
            path = path.rpartition(".")[0]
        elif node.op != "call_module" or (len(node.args) == 1 and not node.kwargs):
            continue
        if path and isinstance(modules.get(path), leaf):
            found.add(modules[path])
    return found


def _attributes_read(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules inside ``module``, which stands at ``path``, of which its code reads an
    attribute: ``path.a.b`` for ``self.a.b.weight``."""
    if type(module).__module__.startswith("torch.nn."):
        return
    prefix = f"{path}." if path else ""
    seen: set[str] = set()
    names = ["forward"]
    while names:
        name = names.pop()
        function = inspect.unwrap(getattr(type(module), name, None) or len)
        if name in seen or not hasattr(function, "__code__"):
            continue
        seen.add(name)
        code = function.__code__
        for chain in _attribute_chains(code, code.co_varnames[0] if code.co_varnames else "self"):
            names.append(chain[0])  # if it is a method, its code is read too
            if len(chain) > 1 and chain[-1] != "forward":
                yield prefix + ".".join(chain[:-1])


def _attribute_chains(code: CodeType, this: str) -> Iterator[list[str]]:
    """For each expression ``this.a.weight`` in ``code``: ``["a"]``, then ``["a", "weight"]``."""
    chain: list[str] | None = None
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and chain is not None:
            chain = [*chain, name]
            yield chain
        elif instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            last = name[-1] if isinstance(name, tuple) else name
            chain = [] if last == this else None
        else:
            chain = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attribute_chains(constant, this)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new``, which takes the place of ``old``, its forward and backward hooks."""
    for name in (*_HOOKS, "_is_full_backward_hook"):
        setattr(new, name, getattr(old, name))


@contextlib.contextmanager
def temporary(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of these handles on leaving."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watching(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """:func:`temporary` for a run that is only looked at: compiled modules run as they are written.
    Compiled anew with the hooks in them, they would take long and be of no use afterwards."""
    with temporary(handles), torch.compiler.set_stance("force_eager"):
        yield


def untraced(hook: _Hook) -> _Hook:
    """``hook`` for a module that may be compiled: torch.compile calls it as it is, and makes it no
    part of the module's own graph."""
    return cast(_Hook, torch.compiler.disable(hook))  # type: ignore[no-untyped-call]


def substitute(
    model: nn.Module,
    replaced: Mapping[nn.Module, nn.Module],
    leaf: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> None:
    """Replace in ``model`` each key of ``replaced`` by its value. If ``forward`` cannot be traced
    afterwards, it reaches a replaced module in some other way than by its name; then all is put
    back."""
    _replace(model, replaced)
    try:
        _Tracer(leaf).trace(model)
    except Exception:  # tracing runs the user's own code on stand-ins, which can fail in any way
        _replace(model, {new: old for old, new in replaced.items()})


def _replace(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replaced:
            model.set_submodule(name, replaced[module])
