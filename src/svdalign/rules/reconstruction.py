"""SVD-space alignment as far as the paper tells of it: a reconstruction, not its formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..feedback import Feedback, StructuredFeedback
from ..losses import cosine_alignment
from ._registry import register
from .base import (
    ErrorSource,
    Rule,
    Supervision,
    UnitSpec,
    add_missed_share,
    check_choice,
    check_counts,
    check_weights,
    task_loss,
)

__all__ = ["SSAReconstruction"]

Alignment = Literal["against-error", "with-error", "target", "subspace", "none"]


@register
@dataclass(frozen=True)
class SSAReconstruction(Rule):
    """``L = task L_CE + alpha L_align + beta L_ortho + gamma L_hoyer`` of each hidden unit, the
    output's error brought to it by a fixed ``B = B_U diag(B_s) B_V^T``.

    What the paper's alignment term is, is not known. ``alignment``, with ``p`` the unit's output
    pooled to ``grid`` x ``grid`` cells, a mean over the batch:

    - ``"against-error"``: ``1 + cos(p, B e)``; moving against ``e = softmax(z) - y`` is downhill;
    - ``"with-error"``: ``1 - cos(p, B e)``, the other sign;
    - ``"target"``: ``1 - cos(p, B y)``;
    - ``"subspace"``: ``1 - ||U^T B_U||_F^2 / k``, the share of the feedback's subspace that is not
      in that of the unit's last layer. ``V`` and ``B_V`` live in different spaces, features that
      come in and classes, and have no such share;
    - ``"none"``.

    The cosines are left out where the error does not come in rows like ``p``, as of pixels.

    To be run as the paper seems to: ``scheme="spatial"``, ``units="layer"``, ``retraction=None``,
    so that ``beta`` is what keeps the factors orthonormal. Source: arXiv 2510.25594, its abstract,
    captions and reviews of an earlier version.
    """

    name: str = "ssa-reconstruction"
    task: float = 1.0
    alignment: Alignment = "against-error"
    alpha: float = 1.0
    beta: float = 0.1
    grid: int | None = 1

    errors: ClassVar[tuple[ErrorSource, ...]] = ("output",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("alignment", self.alignment, get_args(Alignment))
        check_weights(task=self.task, alpha=self.alpha)
        check_counts(grid=self.grid)

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> StructuredFeedback:
        d = unit.pooled_size(self.grid)
        return StructuredFeedback(d, unit.classes, rank=None, learn=False, generator=generator)

    def loss(
        self, unit: UnitSpec, feedback: Feedback, h: Tensor, supervision: Supervision
    ) -> Tensor:
        pooled = unit.pool(h, self.grid)
        loss = self.task * task_loss(self.error, feedback, pooled, supervision)
        wanted = self._wanted(supervision)
        if wanted is None or wanted.shape[:-1] != pooled.shape[:-1]:
            return loss
        direction = feedback.project(wanted.to(pooled.dtype))
        return loss + self.alpha * cosine_alignment(pooled, direction)

    def _wanted(self, supervision: Supervision) -> Tensor | None:
        """What brought back by the feedback is where the unit's output is to turn to."""
        if not self.alpha or self.alignment in ("subspace", "none"):
            return None
        if self.alignment == "target":
            return supervision.target_matrix()
        assert supervision.error is not None, "the engine brings the output's error"
        return -supervision.error if self.alignment == "against-error" else supervision.error

    def weights_loss(self, unit: UnitSpec, feedback: Feedback | None) -> Tensor | None:
        loss = super().weights_loss(unit, feedback)
        weight = self.alpha if self.alignment == "subspace" else 0.0
        return add_missed_share(loss, weight, unit, feedback)

    def readout(self, unit: UnitSpec, feedback: Feedback, h: Tensor) -> Tensor:
        return feedback.readout(unit.pool(h, self.grid))
