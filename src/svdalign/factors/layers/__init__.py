"""Factored layers, each registered for its dense type. Every file of this folder is imported, so a
new one need not be listed anywhere. Imports ``stale.py`` beside this folder, nothing else of the
library."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    REGISTERED,
    SCHEMES,
    FactoredLayer,
    Scheme,
    absolute_rank,
    break_even_rank,
    check_rank,
    dotted,
    factored_layers,
    plain_layer,
    svd_factors,
)
from .convolution import SVDConv2d
from .linear import SVDLinear

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REGISTERED",
    "SCHEMES",
    "FactoredLayer",
    "SVDConv2d",
    "SVDLinear",
    "Scheme",
    "absolute_rank",
    "break_even_rank",
    "check_rank",
    "dotted",
    "factored_layers",
    "plain_layer",
    "svd_factors",
]
