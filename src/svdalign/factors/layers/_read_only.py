"""A tensor that is computed from others and cannot be written to, as the write would be lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Methods that write to their first argument without a name that ends in an underscore.
WRITES = frozenset({
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip

MESSAGE = (
    "the weight of a factored layer cannot be written to, as it is computed from the factors U, s "
    "and V: change these, or give the layer those of another weight W by "
    "layer.set_factors(*svd_factors(layer.to_matrix(W, layer.scheme), rank))"
)


class ReadOnly(Tensor):
    """A tensor that raises RuntimeError when it, or a view of it, is written to.

    What is computed from it is an ordinary tensor. Writes through memory that ``numpy()`` shares
    are not noticed.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        written = [kwargs.get("out")]
        if name in WRITES or (name.endswith("_") and not name.endswith("__")):
            written.append(next(iter((*args, *kwargs.values())), None))
        if any(isinstance(t, ReadOnly) for t in tree_leaves(written)):
            raise RuntimeError(MESSAGE)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {_memory(t) for t in tree_leaves(args) if isinstance(t, ReadOnly)}
            return tree_map(lambda t: _marked(t, memory), result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """An ordinary tensor: its memory is its own."""
        return copy.deepcopy(self.as_subclass(Tensor), memo)


def read_only(t: Tensor) -> Tensor:
    """``t`` as a :class:`ReadOnly`. Where it has no memory (in tracing, under ``torch.func``, on
    the meta device) it is returned as it is."""
    if torch.compiler.is_compiling() or not isinstance(t, Tensor) or t.is_meta:
        return t
    try:
        _memory(t)
    except (NotImplementedError, RuntimeError):
        return t
    return t.as_subclass(ReadOnly)


def _marked(value: Any, memory: set[int]) -> Any:
    shares = isinstance(value, Tensor) and _memory(value) in memory
    return value.as_subclass(ReadOnly) if shares else value


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
