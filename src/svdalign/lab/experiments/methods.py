"""The methods that can be compared, with the hyperparameters that each was tuned to.

Every method got the same search of its learning rate, DFA one of its raster besides; the six that
stand for the rest (``bp-dense``, ``bp``, ``dfa``, ``ssa-local``, ``ssa-1``, ``ssa``) got a second
one on more held-out images (``benchmarks/tune.py``), which settles them; so did ``ssa-output`` and
``ssa-dense``, at the default horizon. What is not named here is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..training.config import DENSE, JobConfig, RunConfig, plain

__all__ = [
    "BACKPROP",
    "DEFAULT",
    "METHODS",
    "Method",
    "check_settings",
    "method_config",
]


@dataclass(frozen=True)
class Method:
    """A rule as it takes part in a comparison.

    ``label``: how tables and figures call it. ``factored``: whether weights are held as
    ``U diag(s) V^T`` at the job's rank, or dense. ``options``: fields of the rule that differ from
    its own. ``lr``: tuned peak learning rate.
    """

    label: str
    rule: str
    factored: bool = field(default=True, kw_only=True)
    lr: float = field(kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


METHODS: dict[str, Method] = {
    "bp-dense": Method("BP, dense", "bp", factored=False, lr=1e-2),
    "bp": Method("BP, factored", "bp", lr=1e-2),
    "fa": Method("FA", "fa", lr=5e-3),
    "dfa-dense": Method("DFA, dense", "dfa", factored=False, lr=5e-3, options={"grid": 2}),
    "dfa": Method("DFA", "dfa", lr=5e-3, options={"grid": 2}),
    "drtp": Method("DRTP", "drtp", lr=5e-3),
    "ssa-reconstruction": Method("SSA, our reconstruction", "ssa-reconstruction", lr=5e-3),
    "ssa-output": Method("SSA, output error", "ssa", lr=1e-2, options={"error": "output"}),
    "ssa-local": Method("SSA, horizon 0", "ssa-local", lr=1e-2),
    "ssa-1": Method("SSA, horizon 1", "ssa", lr=1e-2, options={"horizon": 1}),
    "ssa": Method("SSA, horizon 2", "ssa", lr=1e-2),
    "ssa-dense": Method("SSA, horizon 2, dense", "ssa", factored=False, lr=2e-2),
}

#: For help texts.
BACKPROP = "bp-dense is backpropagation, bp the same on factored weights"

DEFAULT = ["bp-dense", "bp", "dfa", "ssa"]  #: what a comparison takes unless told otherwise


def method_config(
    method: str | Method,
    job: JobConfig,
    *,
    seed: int,
    lr: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run of ``method``, one of these or its name, within ``job``. ``lr`` replaces its tuned
    rate, ``settings`` any field of the run; of ``options`` in it those that are named."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; available: {', '.join(METHODS)}")
        method = METHODS[method]
    fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(JobConfig)}
    if not method.factored:
        fields |= DENSE
    fields |= {"rule": method.rule, "lr": method.lr if lr is None else lr, "seed": seed}
    fields |= {} if settings is None else settings
    fields["options"] = {**method.options, **fields.get("options", {})}
    return RunConfig(**fields)


def check_settings(settings: Mapping[str, Any], methods: Iterable[str]) -> dict[str, Any]:
    """``settings`` by method with values as they are meant; ValueError for a method that is not
    among ``methods`` and for settings that are no fields of a run."""
    if unknown := sorted(set(settings) - set(methods)):
        raise ValueError(
            f"settings names {', '.join(unknown)}, but the methods are {', '.join(methods)}"
        )
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for name, fields in settings.items():
        if not isinstance(fields, Mapping):
            raise ValueError(f"settings of {name} must be {{field: value}}, got {fields!r}")
        if wrong := sorted(set(fields) - set(known)):
            raise ValueError(
                f"settings of {name} name {', '.join(wrong)}; a run has {', '.join(known)}"
            )
    return {name: plain(fields) for name, fields in settings.items()}
