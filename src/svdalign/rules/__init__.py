"""Learning rules: one file each, which registers its rules by name. Every file of this folder is
imported, so that a new one is known without being listed anywhere.

Imports factors, feedback, losses and the task; knows nothing of the engine.
"""

from importlib import import_module
from pkgutil import iter_modules

from ._registry import available, get, register
from .base import ErrorSource, Rule, Supervision, UnitSpec
from .bp import BP
from .dfa import DFA, DRTP
from .fa import FA
from .reconstruction import SSAReconstruction
from .sign import BatchwiseRandomSign, SignSymmetric
from .ssa import SSA

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BP",
    "DFA",
    "DRTP",
    "FA",
    "SSA",
    "BatchwiseRandomSign",
    "ErrorSource",
    "Rule",
    "SSAReconstruction",
    "SignSymmetric",
    "Supervision",
    "UnitSpec",
    "available",
    "get",
    "register",
]
