"""Learning rules, by name: one module each, which registers what it defines."""

from ._registry import available, get, register
from .base import ErrorSource, Rule, Supervision, UnitSpec
from .bp import BP
from .dfa import DFA, DRTP
from .fa import FA
from .reconstruction import SSAReconstruction
from .sign import BatchwiseRandomSign, SignSymmetric
from .ssa import SSA

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
