"""Which factored layer stands for which dense layer.

A subclass of :class:`~svdalign.factors.FactoredLayer` names its dense type in its class statement
and is found from then on by everything that asks here: ``factorize``, ``compact``, the layout of a
unit's output, feedback alignment.
"""

from __future__ import annotations

from torch import nn

from .._copying import with_own_weight
from .layers import REGISTERED, FactoredLayer, dotted


def dense_names() -> str:
    """The dense types that can be factored, to be named in a message."""
    return ", ".join(sorted(name.rpartition(".")[2] for name in REGISTERED))


def factored_type(dense: nn.Module) -> type[FactoredLayer] | None:
    """The factored type for ``dense``, which may be of a subclass of a dense type; or None."""
    names = map(dotted, type(dense).__mro__)
    return next((REGISTERED[name] for name in names if name in REGISTERED), None)


def kind_of(layer: nn.Module) -> type[FactoredLayer] | None:
    """The factored type of ``layer``, be it factored or dense; None if it is neither."""
    return type(layer) if isinstance(layer, FactoredLayer) else factored_type(layer)


def dense_copy(layer: nn.Module) -> nn.Module:
    """A dense layer of the function of ``layer``, whose weight is a parameter of its own."""
    return layer.dense() if isinstance(layer, FactoredLayer) else with_own_weight(layer)


def own_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of ``module`` itself, without its children's, that may be weights of a linear map.

    Vectors such as positions (1, T, d) and scales (C, 1, 1) are none, nor are those of a norm.
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim >= 2 and min(p.shape[:2]) > 1]
