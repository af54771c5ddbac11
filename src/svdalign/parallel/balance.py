"""How long each unit takes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..engine import Learner
from ..factors.stiefel import RETRACTIONS


def unit_seconds(learner: Learner, x: Any, y: Tensor, repeats: int = 5) -> list[float]:
    """Seconds that each unit takes for a batch, the least of ``repeats``: forward, backward, and
    the retraction of its factors (an optimizer's step is short beside these).

    Measured on this process; the learner stays as it is. Meant for horizon 0: with more, a unit's
    backward pass waits for units after it and is counted with them.
    """
    ends: dict[str, float] = {}
    found: list[list[float]] = []
    retired = learner._retired
    learner._retired = lambda unit, _: ends.update({unit.name: time.perf_counter()})
    try:
        for _ in range(repeats + 1):  # the first is a warm-up
            ends.clear()
            last = time.perf_counter()
            learner.gradients(x, y)
            seconds = []
            for unit in learner.units:  # a frozen one does not retire: what it takes is the next's
                end = ends.get(unit.name, last)
                seconds.append(end - last)
                last = end
            found.append(seconds)
    finally:
        learner._retired = retired
    steps = [min(times) for times in zip(*found[1:], strict=True)]
    return [s + _retraction_seconds(learner, i, repeats) for i, s in enumerate(steps)]


@torch.no_grad()
def _retraction_seconds(learner: Learner, index: int, repeats: int) -> float:
    if learner.retraction is None:
        return 0.0
    retract, unit = RETRACTIONS[learner.retraction], learner.units[index]
    factors = [X for layer in learner.unit_spec(unit).layers for X in (layer.U, layer.V)]
    for i in range(len(unit.features)):
        feedback = learner.feedback_of(unit, i)
        factors += [p for p in feedback.parameters() if p.ndim == 2] if feedback else []
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for X in factors:
            if X.requires_grad:
                retract(X)
        taken.append(time.perf_counter() - started)
    return min(taken) / learner.retract_every
