"""Learning rules, by name: one module each, which registers what it defines."""

from ._registry import available, get, register
from .base import ErrorSource, Rule, Supervision, UnitSpec
from .bp import BP
from .dfa import DFA, DRTP
from .fa import FA
from .sign import SignSymmetric
from .ssa import SSA

__all__ = [
    "BP",
    "DFA",
    "DRTP",
    "FA",
    "SSA",
    "ErrorSource",
    "Rule",
    "SignSymmetric",
    "Supervision",
    "UnitSpec",
    "available",
    "get",
    "register",
]
