"""Which factored layer stands for which dense layer.

A subclass of :class:`~svdalign.factors.FactoredLayer` names its dense type in its class statement,
``class SVDLinear(FactoredLayer, dense=nn.Linear)``, and is found from then on by everything that
asks here: ``factorize``, ``compact``, the layout of a unit's output, feedback alignment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .layers import FactoredLayer

__all__ = [
    "dense_names",
    "factored_type",
    "is_layer_of",
    "own_matrices",
    "register",
    "registered",
]

_TYPES: dict[str, type[FactoredLayer]] = {}


def register(dense: type[nn.Module] | str, factored: type[FactoredLayer]) -> None:
    """Let ``factored`` stand for layers of type ``dense``.

    ``dense`` may be a dotted name, ``"package.module.Class"``, for a type of a library that need
    not be installed.
    """
    _TYPES[dense if isinstance(dense, str) else _dotted(dense)] = factored


def registered() -> dict[str, type[FactoredLayer]]:
    """The factored type by the dotted name of its dense type."""
    return dict(_TYPES)


def dense_names() -> str:
    """The dense types that can be factored, to be named in a message."""
    return ", ".join(sorted(name.rpartition(".")[2] for name in _TYPES))


def factored_type(layer: nn.Module) -> type[FactoredLayer] | None:
    """The factored type for ``layer``, which may be of a subclass of a dense type; or None."""
    names = map(_dotted, type(layer).__mro__)
    return next((_TYPES[name] for name in names if name in _TYPES), None)


def is_layer_of(layer: nn.Module, factored: type[FactoredLayer]) -> bool:
    """Whether ``layer`` is of the very dense type of ``factored``, and of no subclass of it."""
    return _TYPES.get(_dotted(type(layer))) is factored


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def own_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of ``module`` itself, without its children's, that may be weights of a linear map.

    Vectors such as positions (1, T, d) and scales (C, 1, 1) are none, nor are those of a norm.
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim >= 2 and min(p.shape[:2]) > 1]
