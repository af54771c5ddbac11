"""Learning rules by name."""

from __future__ import annotations

from .base import ErrorSource, Rule, Teaching, TeachingUnit
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
    "Teaching",
    "TeachingUnit",
    "available",
    "get",
]

_RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        BP(),
        FA(),
        SignSymmetric(),
        DFA(),
        DRTP(),
        SSA(),
        SSA(name="ssa-local", horizon=0),
        SSA(
            name="ssa-paper",
            horizon=0,
            error="output",
            learn=False,
            alignment="share",
            alpha=1.0,
            beta=0.1,
        ),
    )
}


def available() -> list[str]:
    """Names that :func:`get` knows."""
    return sorted(_RULES)


def get(rule: str | Rule) -> Rule:
    """The rule of that name; a :class:`Rule` is returned as it is."""
    if isinstance(rule, Rule):
        return rule
    if rule not in _RULES:
        raise ValueError(f"rule must be a Rule or one of {available()}, got {rule!r}")
    return _RULES[rule]
