"""The vocabulary of methods: everything that the lab trains, compares, profiles and tunes, by name.

A name is a base with up to two suffixes, in this order:

- the base is one of :data:`METHODS`, any registered rule, or a rule of your own as
  ``package.module:Class`` (a subclass of :class:`svdalign.rules.Rule` that needs no arguments, or
  an instance of one);
- ``-dense``: the weights are dense, not factored;
- ``-checkpointed``: activations are recomputed in the backward pass (gradient checkpointing).

So ``bp`` is backpropagation on factored weights, ``bp-dense`` plain backpropagation, and
``bp-dense-checkpointed`` the latter with gradient checkpointing.

The learning rates come from one search, the same for every method (``svdalign tune``). Other
rules train at :data:`DEFAULT_LR` unless told otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import rules
from ..rules import Rule
from ._named import did_you_mean, search_here

DEFAULT_LR = 1e-2

_DENSE, _CHECKPOINTED = "-dense", "-checkpointed"


@dataclass(frozen=True)
class Method:
    """A rule, the form of its weights, and the settings that it was tuned to.

    ``label``: its name in tables and figures. ``rule``: the name of a registered rule, or
    ``package.module:Class``. ``factored``: weights are ``U diag(s) V^T``, otherwise dense.
    ``checkpointed``: activations are recomputed in the backward pass. ``lr``: peak learning rate.
    ``options``: fields of the rule that differ from its defaults.
    """

    label: str
    rule: str
    factored: bool = field(default=True, kw_only=True)
    checkpointed: bool = field(default=False, kw_only=True)
    lr: float = field(default=DEFAULT_LR, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def name(self) -> str:
        """Rule and suffixes: all of the method but its options and learning rate."""
        return self.rule + _DENSE * (not self.factored) + _CHECKPOINTED * self.checkpointed

    def make_rule(self) -> Rule:
        """The rule with its own defaults; ``options`` are not in it."""
        search_here()
        return rules.get(self.rule)


METHODS: dict[str, Method] = {
    "bp-dense": Method("BP", "bp", factored=False, lr=1.4e-2),
    "bp": Method("SVD-BP", "bp", lr=1e-2),
    "fa": Method("FA", "fa", lr=5e-3),
    "sign-symmetric": Method("Sign-symmetric (uSF)", "sign-symmetric", lr=1.4e-2),
    "brsf": Method("Sign-symmetric (brSF)", "brsf", lr=1e-2),
    "dfa-dense": Method("DFA, dense", "dfa", factored=False, lr=5e-3, options={"grid": 2}),
    "dfa": Method("DFA", "dfa", lr=5e-3, options={"grid": 2}),
    "drtp": Method("DRTP", "drtp", lr=5e-3),
    "ssa-reconstruction": Method("SSA, our reconstruction", "ssa-reconstruction", lr=5e-3),
    "ssa": Method("SSA, horizon 0", "ssa", lr=1e-2),
    "ssa-1": Method("SSA, horizon 1", "ssa", lr=1e-2, options={"horizon": 1}),
    "ssa-2": Method("SSA, horizon 2", "ssa", lr=1.4e-2, options={"horizon": 2}),
    "ssa-output": Method(
        "SSA, output error", "ssa", lr=1.4e-2, options={"horizon": 2, "error": "output"}
    ),
    "ssa-2-dense": Method(
        "SSA, horizon 2, dense", "ssa", factored=False, lr=2e-2, options={"horizon": 2}
    ),
}

DEFAULT = ["bp-dense", "bp", "dfa", "ssa"]  #: what a comparison takes unless told otherwise


def available() -> list[str]:
    """Names that :func:`get` takes as they are and with suffixes: METHODS and registered rules."""
    return list(dict.fromkeys([*METHODS, *rules.available()]))


#: For help texts.
HELP = (
    f"{', '.join(available())}, or a rule of your own as package.module:Class; each also with "
    "-dense (dense weights) and -checkpointed (gradient checkpointing) behind it; bp is "
    "backpropagation on factored weights, bp-dense plain backpropagation"
)


def get(name: str) -> Method:
    """The method of that name; ValueError that says what there is for a name that is none."""
    method = _find(name)
    if method is None:
        raise ValueError(
            f"unknown method {name!r}{did_you_mean(name, available())} "
            f"(available: {', '.join(available())}, or package.module:Class; "
            f"{_DENSE} and {_CHECKPOINTED} may follow)"
        )
    return method


def _find(name: str) -> Method | None:
    if name in METHODS:
        return METHODS[name]
    if name.endswith(_CHECKPOINTED):
        base = _find(name.removesuffix(_CHECKPOINTED))
        if base is None or base.checkpointed:
            return None
        return dataclasses.replace(base, label=f"{base.label}, checkpointed", checkpointed=True)
    if name.endswith(_DENSE):
        base = _find(name.removesuffix(_DENSE))
        if base is None or base.checkpointed or not base.factored:
            return None
        return dataclasses.replace(base, label=f"{base.label}, dense", factored=False)
    if ":" in name:
        method = Method(name.rpartition(":")[2], name)
        method.make_rule()  # refuses what is no rule
        return method
    return Method(name, name) if name in rules.available() else None
