"""Backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

from ._registry import register
from .base import Rule

__all__ = ["BP"]


@register
@dataclass(frozen=True)
class BP(Rule):
    """The exact gradient of the task loss, through the whole network."""

    name: str = "bp"
    horizon: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon is not None:
            raise ValueError(
                f"rule {self.name!r} carries errors through every layer: horizon must be None, "
                f"got {self.horizon}"
            )
        if self.error != "output":
            raise ValueError(
                f"rule {self.name!r} takes no source of errors, for it carries the output's error "
                f"through every layer, got error {self.error!r}"
            )
