"""The methods that can be compared, with the hyperparameters that each was tuned to.

Every method got the same search on the default job. What is not named here is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..training.config import JobConfig, RunConfig

__all__ = ["DEFAULT", "METHODS", "Method", "method_config"]


@dataclass(frozen=True)
class Method:
    """A rule as it takes part in a comparison.

    ``label``: how tables and figures call it. ``factored``: whether weights are held as
    ``U diag(s) V^T`` at the job's rank, or dense. ``options``: fields of the rule that differ from
    its own. ``lr``: tuned peak learning rate.
    """

    label: str
    rule: str
    factored: bool = True
    lr: float = 2e-3
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "bp-dense": Method("BP, dense", "bp", factored=False),
    "bp": Method("BP, factored", "bp"),
    "fa": Method("FA", "fa"),
    "dfa-dense": Method("DFA, dense", "dfa", factored=False),
    "dfa": Method("DFA", "dfa"),
    "drtp": Method("DRTP", "drtp"),
    "ssa-paper": Method("SSA, as published", "ssa-paper"),
    "ssa-output": Method("SSA, output error", "ssa", options={"error": "output"}),
    "ssa-local": Method("SSA, horizon 0", "ssa-local"),
    "ssa": Method("SSA, horizon 1", "ssa"),
    "ssa-2": Method("SSA, horizon 2", "ssa", options={"horizon": 2}),
    "ssa-dense": Method("SSA, horizon 1, dense", "ssa", factored=False),
}

DEFAULT = ["bp-dense", "bp", "dfa", "ssa"]  #: what a comparison takes unless told otherwise


def method_config(name: str, job: JobConfig, *, seed: int, lr: float | None = None) -> RunConfig:
    """The run of method ``name`` within ``job``. ``lr`` replaces the method's tuned rate."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; available: {', '.join(METHODS)}")
    method = METHODS[name]
    shared = {f.name: getattr(job, f.name) for f in dataclasses.fields(JobConfig)}
    if not method.factored:
        shared |= {"rank": None, "rank_energy": None}
    return RunConfig(
        **shared,
        rule=method.rule,
        options=dict(method.options),
        lr=method.lr if lr is None else lr,
        seed=seed,
    )
