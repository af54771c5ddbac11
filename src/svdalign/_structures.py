"""Nested values that modules return: tuples, lists, dicts, dataclasses, and the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten


def taken_apart(value: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of ``value``, and a function that makes the like of ``value`` from other leaves.

    Beside what torch knows (tuples, lists, dicts), dataclasses and subclasses of dict are looked
    into.
    """
    nodes, structure = tree_flatten(value)
    inside = [None if (named := _named(node)) is None else taken_apart(named) for node in nodes]
    flat: list[Any] = []
    for node, parts in zip(nodes, inside, strict=True):
        flat += [node] if parts is None else parts[0]

    def again(new: Sequence[Any]) -> Any:
        left = iter(new)
        rebuilt = [
            next(left) if parts is None else _with(node, parts[1]([next(left) for _ in parts[0]]))
            for node, parts in zip(nodes, inside, strict=True)
        ]
        return tree_unflatten(rebuilt, structure)

    return flat, again


def leaves(value: Any) -> list[Any]:
    """The leaves of ``value``, see :func:`taken_apart`."""
    return taken_apart(value)[0]


def _named(node: Any) -> dict[Any, Any] | None:
    """The entries of ``node`` by name, if it is a dict of a kind of its own or a dataclass."""
    if isinstance(node, dict):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return None


def _with(node: Any, named: dict[Any, Any]) -> Any:
    new = copy.copy(node)
    if isinstance(node, dict):
        new.update(named)
    else:
        for name, value in named.items():
            object.__setattr__(new, name, value)  # a frozen dataclass refuses the usual way
    return new
