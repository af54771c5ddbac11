"""SVD-space alignment: the composite local loss on factored weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..feedback import Feedback, StructuredFeedback, WidenedFeedback, grid_size
from ..losses import cosine_alignment, statistics_alignment
from ._registry import register
from .base import (
    ErrorSource,
    Rule,
    Supervision,
    UnitSpec,
    check_weights,
    missed_share,
    task_loss,
)

__all__ = ["SSA"]

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
    horizon: int | None = 2
    error: ErrorSource = "local"
    alpha: float = 4.0
    alignment: Alignment = "similarity"
    grid: int | None = 4
    feedback_rank: int | None = 64
    learn: bool = True
    widen: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment not in get_args(Alignment):
            raise ValueError(
                f"alignment must be one of {get_args(Alignment)}, got {self.alignment!r}"
            )
        check_weights(alpha=self.alpha)
        if not isinstance(self.learn, bool):
            raise ValueError(f"learn must be true or false, got {self.learn!r}")
        for name in ("grid", "feedback_rank", "widen"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                raise ValueError(
                    f"{name} must be a whole number of at least 1 or None, got {value!r}"
                )
        if self.widen is not None and self.alignment in ("share", "cosine"):
            raise ValueError(
                f"alignment {self.alignment!r} needs feedback that is a matrix: widen must be "
                f"None, got {self.widen}"
            )
        if self.widen is not None and self.grid is None:
            raise ValueError(f"widen needs a grid, a whole number of at least 1, got {self.grid}")

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> Feedback:
        made: dict[str, Any] = {
            "rank": self.feedback_rank,
            "learn": self.learn,
            "generator": generator,
        }
        if self.widen is None or self.grid is None or not self._widens(unit):
            return StructuredFeedback(unit.pooled_size(self.grid), unit.classes, **made)
        size = grid_size(unit.features_shape, self._grid(unit), unit.output_shape) or (1, 1)
        shape = (unit.features_shape[1], *size)
        return WidenedFeedback(shape, unit.classes, wide=self.widen, grid=self.grid, **made)

    def loss(
        self, unit: UnitSpec, feedback: nn.Module | None, h: Tensor, supervision: Supervision
    ) -> Tensor:
        assert isinstance(feedback, Feedback)
        aligned = self.alpha > 0 and supervision.task.one_class_a_sample
        if aligned and self.alignment == "similarity":
            pooled, statistics = unit.pool_and_statistics(h, self._grid(unit))
            alignment = statistics_alignment(statistics, supervision.target_matrix())
            return task_loss(self.error, feedback, pooled, supervision) + self.alpha * alignment
        pooled = unit.pool(h, self._grid(unit))
        loss = task_loss(self.error, feedback, pooled, supervision)
        if aligned and self.alignment == "cosine":
            directions = feedback.project(supervision.target_matrix().to(pooled.dtype))
            loss = loss + self.alpha * cosine_alignment(pooled, directions)
        return loss

    def readout(self, unit: UnitSpec, feedback: nn.Module, h: Tensor) -> Tensor:
        assert isinstance(feedback, Feedback)
        return feedback.readout(unit.pool(h, self._grid(unit)))

    def _widens(self, unit: UnitSpec) -> bool:
        """Whether ``unit`` is read through a convolution: if it has a map, and a narrow one."""
        is_map = len(unit.features_shape) == 4 and len(unit.output_shape) != 4
        return self.widen is not None and is_map and unit.features_shape[1] < self.widen

    def _grid(self, unit: UnitSpec) -> int | None:
        """The grid of what feedback reads: twice as fine where a convolution comes before."""
        return 2 * self.grid if self.grid is not None and self._widens(unit) else self.grid

    def weights_loss(self, unit: UnitSpec, feedback: nn.Module | None) -> Tensor | None:
        loss = super().weights_loss(unit, feedback)
        if not self.alpha or self.alignment != "share":
            return loss
        missed = missed_share(unit, feedback)
        if missed is None:
            return loss
        return self.alpha * missed if loss is None else loss + self.alpha * missed


register(SSA(name="ssa-local", horizon=0))
