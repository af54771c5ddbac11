"""Learning rules: one file each, which registers its rules by name. Imports factors, feedback,
losses and the task; knows nothing of the engine."""

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
