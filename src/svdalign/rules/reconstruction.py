"""SVD-space alignment as the paper's public texts describe it: a reconstruction."""

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

Alignment = Literal["against-error", "with-error", "target", "subspace", "none"]


@register
@dataclass(frozen=True)
class SSAReconstruction(Rule):
    """``L = task L_CE + alpha L_align + beta L_ortho + gamma L_hoyer`` for each hidden unit. A
    fixed ``B = B_U diag(B_s) B_V^T`` brings the output's error to it.

    The paper's alignment term is not known to us. ``alignment`` chooses one; ``p`` is the unit's
    output pooled to ``grid`` x ``grid`` cells, and the cosines are averaged over the batch:

    - ``"against-error"``: ``1 + cos(p, B e)``, as moving against ``e = softmax(z) - y`` is
    downhill;
    - ``"with-error"``: ``1 - cos(p, B e)``, the other sign;
    - ``"target"``: ``1 - cos(p, B y)``;
    - ``"subspace"``: ``1 - ||U^T B_U||_F^2 / k``, the share of the feedback's subspace that is
      outside that of the unit's last layer. There is no such share of ``V`` and ``B_V``, whose
      columns are in different spaces: a layer's inputs, and classes;
    - ``"none"``.

    The cosines are left out where the error has no rows like those of ``p``, as for pixels.

    The paper seems to run it with ``scheme="spatial"``, ``units="layer"`` and ``retraction=None``,
    so that ``beta`` alone keeps the factors orthonormal. Source: arXiv 2510.25594, its abstract,
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
        """The direction, in the space of outputs, that the cosine compares ``p`` with."""
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
