"""SVD-space alignment: the composite local loss on factored weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..feedback import Feedback, StructuredFeedback, WidenedFeedback, grid_size
from ..losses import cosine_alignment, statistics_alignment
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

Alignment = Literal["similarity", "share", "cosine", "none"]


@register
@dataclass(frozen=True)
class SSA(Rule):
    """``L = L_task + alpha L_align + beta L_ortho``, the error brought by ``B_U diag(B_s) B_V^T``.

    ``alignment``: the form of ``L_align`` (see :mod:`svdalign.losses`); similarity and cosine are
    for one class a sample, and left out for other tasks (they did not help regression or several
    labels a sample). ``grid``: feature maps are pooled to ``grid`` x ``grid`` cells.
    ``feedback_rank``: the largest rank k of the feedback, None for ``min(d, C)``; it keeps ``B``
    small for large vocabularies.
    ``learn``: the feedback is trained by the unit's own loss. ``widen``: maps of fewer channels are
    read through a convolution of their own that makes so many, on a grid twice as fine
    (:class:`WidenedFeedback`); None reads all as they are. It is for residual networks, whose early
    units are too narrow to tell classes apart by.
    Source: arXiv 2510.25594; local error and horizon are this project's.
    """

    name: str = "ssa"
    horizon: int | None = 0
    error: ErrorSource = "local"
    alpha: float = 4.0
    alignment: Alignment = "similarity"
    grid: int | None = 4
    feedback_rank: int | None = 64
    learn: bool = True
    widen: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("alignment", self.alignment, get_args(Alignment))
        check_weights(alpha=self.alpha)
        if not isinstance(self.learn, bool):
            raise ValueError(f"learn must be true or false, got {self.learn!r}")
        check_counts(grid=self.grid, feedback_rank=self.feedback_rank, widen=self.widen)
        if self.widen is not None and self.alignment in ("share", "cosine"):
            raise ValueError(
                f"alignment {self.alignment!r} needs feedback that is a matrix: widen must be "
                f"None, got {self.widen}"
            )
        if self.widen is not None and self.grid is None:
            raise ValueError(f"widen needs a grid, a whole number of at least 1, got {self.grid}")

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Feedback:
        options: dict[str, Any] = {
            "rank": self.feedback_rank,
            "learn": self.learn,
            "generator": generator,
        }
        shape, grid = unit.features_shape, self._grid(WidenedFeedback)
        size = grid_size(shape, grid, unit.output_shape)
        if size is None or self.widen is None or self.grid is None or shape[1] >= self.widen:
            return StructuredFeedback(unit.pooled_size(self.grid), unit.classes, **options)
        map_shape = (shape[1], *size)
        return WidenedFeedback(map_shape, unit.classes, wide=self.widen, grid=self.grid, **options)

    def loss(
        self, unit: UnitSpec, feedback: Feedback, h: Tensor, supervision: Supervision
    ) -> Tensor:
        aligned = self.alpha > 0 and supervision.task.one_class_a_sample
        if aligned and self.alignment == "similarity":
            pooled, statistics = unit.pool_and_statistics(h, self._grid(feedback))
            wanted = supervision.target_directions(statistics.dtype)
            alignment = statistics_alignment(statistics, wanted)
            return task_loss(self.error, feedback, pooled, supervision) + self.alpha * alignment
        pooled = unit.pool(h, self._grid(feedback))
        loss = task_loss(self.error, feedback, pooled, supervision)
        if aligned and self.alignment == "cosine":
            directions = feedback.project(supervision.target_matrix().to(pooled.dtype))
            loss = loss + self.alpha * cosine_alignment(pooled, directions)
        return loss

    def readout(self, unit: UnitSpec, feedback: Feedback, h: Tensor) -> Tensor:
        return feedback.readout(unit.pool(h, self._grid(feedback)))

    def weights_loss(self, unit: UnitSpec, feedback: Feedback | None) -> Tensor | None:
        loss = super().weights_loss(unit, feedback)
        weight = self.alpha if self.alignment == "share" else 0.0
        return add_missed_share(loss, weight, unit, feedback)

    def _grid(self, feedback: Feedback | type[Feedback]) -> int | None:
        """The grid that a unit's maps are pooled onto for ``feedback``."""
        return None if self.grid is None else feedback.fineness * self.grid
