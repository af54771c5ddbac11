"""Direct feedback alignment and direct random target projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..feedback import Feedback, GaussianFeedback
from ._registry import register
from .base import ErrorSource, Rule, Supervision, UnitSpec, task_loss


@register
@dataclass(frozen=True)
class DFA(Rule):
    """A fixed random matrix brings the output's error to each unit: ``delta = P^T B e``.

    ``grid``: feature maps are pooled to ``grid`` x ``grid`` cells; None gives every position its
    own row of ``B``, as in the source. Source: Noekland (2016), eq. 7.
    """

    name: str = "dfa"
    error: ErrorSource = "output"
    grid: int | None = None

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Feedback:
        return GaussianFeedback(unit.pooled_size(self.grid), unit.classes, generator=generator)

    def loss(
        self, unit: UnitSpec, feedback: Feedback, h: Tensor, supervision: Supervision
    ) -> Tensor:
        return task_loss(self.error, feedback, unit.pool(h, self.grid), supervision)

    def readout(self, unit: UnitSpec, feedback: Feedback, h: Tensor) -> Tensor:
        return feedback.readout(unit.pool(h, self.grid))


@register
@dataclass(frozen=True)
class DRTP(DFA):
    """DFA with the targets in place of the error, so that no unit has to wait for the output.

    Source: Frenkel, Lefebvre and Bol, *Learning Without Feedback: Fixed Random Learning Signals
    Allow for Feedforward Training of Deep Neural Networks* (2021).
    """

    name: str = "drtp"
    error: ErrorSource = "target"
