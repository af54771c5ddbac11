"""Which process owns what, where one hands over to the next, and what cannot be split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._structures import taken_apart
from .._tracing import watching
from ..engine import Learner
from ..engine.forward import forward, preserved
from ..engine.ownership import reached

Calls = dict[str, set[int]]
"""For each module that is called, by path, the units in which it runs."""


def refuse_early_updates(learner: Learner) -> None:
    """ValueError for a learner that updates units before the step is over."""
    if learner.update_early:
        raise ValueError(
            "several processes update all units at the end of a step: make the learner with "
            "update_early=False"
        )


def refuse(learner: Learner) -> None:
    """ValueError for a learner whose units cannot learn side by side."""
    refuse_early_updates(learner)
    if learner.horizon is None:
        raise ValueError(
            "horizon=None is backpropagation, whose errors come back through all units: no unit "
            "can learn before the last one has run. Give a horizon, best 0"
        )
    if learner.rule.error == "output" and len(learner.feedback):
        raise ValueError(
            f"rule {learner.rule.name!r} teaches with the output's error, which the last process "
            'alone knows; use error="local" or error="target"'
        )


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a unit's output, detached."""
    return [v.detach() for v in taken_apart(output)[0] if isinstance(v, Tensor)]


def owners(learner: Learner, calls: Calls, place: Sequence[int]) -> dict[str, int | None]:
    """The process that owns each parameter and buffer, by name; None where every process has it."""
    model, units = learner.model, learner.units
    found: dict[str, int | None] = {}
    for unit, rank in zip(units, place, strict=True):
        for name in unit.parameters:
            if found.setdefault(f"model.{name}", rank) != rank:
                raise ValueError(
                    f"parameter {name!r} is shared by units of processes "
                    f"{found[f'model.{name}']} and {rank}; give a partition that keeps them "
                    "together"
                )
    by_index = {str(i): rank for i, rank in enumerate(place)}
    for name, _ in (*learner.feedback.named_parameters(), *learner.feedback.named_buffers()):
        found[f"feedback.{name}"] = by_index[name.partition(".")[0].partition("_")[0]]
    for name, _ in model.named_buffers():
        path = name
        while path and path not in calls:  # a module that is not called is at work in its parent
            path = path.rpartition(".")[0]
        ranks = {place[i] for i in calls[path]}
        # What is at work in several processes keeps its buffers in all of them.
        found[f"model.{name}"] = min(ranks) if len(ranks) == 1 else None
    return found


def before(calls: Calls, first: int) -> list[str]:
    """Paths of modules that are done before unit ``first`` begins; not of those inside these."""
    done = {path: None for path, units in calls.items() if path and max(units) < first}
    return [path for path in done if path.rpartition(".")[0] not in done]


def at_work(learner: Learner, x: Any) -> Calls:
    """For each module that is called for ``x``, by path, the units in which it runs."""
    ends = Counter(unit.exit for unit in learner.units[:-1])
    found: Calls = {}
    done = 0
    handles = []

    def begin(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            found.setdefault(path, set()).add(done)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal done
            found[path].update(range(min(found[path]), done + 1))
            done += ends[path] > 0

        return hook

    for path, module in learner.model.named_modules():
        handles += [
            module.register_forward_pre_hook(begin(path)),
            module.register_forward_hook(end(path)),
        ]
    with watching(handles), preserved(learner.model), torch.no_grad():
        forward(learner.model, x)
    return found


def check_borders(learner: Learner, x: Any, place: Sequence[int], first: int) -> list[Tensor]:
    """ValueError if a unit reads more from earlier processes than the output of the unit before.
    Returns that output for ``x``, of the unit before unit ``first``."""
    units = learner.units
    calls = Counter(unit.exit for unit in units)
    border: list[Tensor] = []
    leaves: list[nn.Parameter] = []
    made_by: dict[int, int] = {}
    at = iter(range(len(units)))

    def check(outputs: list[Tensor], index: int) -> None:
        for leaf in reached(outputs, leaves):
            source = made_by[id(leaf)]
            if place[source] != place[index] and source != place.index(place[index]) - 1:
                raise ValueError(
                    f"unit {units[index].name!r} of process {place[index]} reads what unit "
                    f"{units[source].name!r} of process {place[source]} made, but only what the "
                    "last unit before a process hands on reaches it; give a partition that keeps "
                    "them together"
                )

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        index = next(at)
        values, like_output = taken_apart(output)
        check([v for v in values if isinstance(v, Tensor)], index)
        if index == first - 1:
            border.extend(tensors_of(output))
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.requires_grad:
                leaf = nn.Parameter(value.detach())
                leaves.append(leaf)
                made_by[id(leaf)] = index
                values[i] = leaf.clone()
        return like_output(values)

    ends = [unit for i, unit in enumerate(units[:-1]) if place[i] != place[i + 1]]
    if odd := [unit.exit for unit in ends if calls[unit.exit] > 1]:
        raise ValueError(
            f"module {odd[0]!r}, where one process would end, is called more than once; give "
            "another partition"
        )
    paths = dict.fromkeys(unit.exit for unit in units[:-1])
    handles = [learner.model.get_submodule(p).register_forward_hook(hook) for p in paths]
    with watching(handles), preserved(learner.model), torch.enable_grad():
        z = forward(learner.model, x)
    check([z], len(units) - 1)
    return border
