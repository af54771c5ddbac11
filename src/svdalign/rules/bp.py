"""Backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._registry import register
from .base import ErrorSource, Rule


@register
@dataclass(frozen=True)
class BP(Rule):
    """The exact gradient of the task loss, through the whole network."""

    name: str = "bp"
    horizon: int | None = None

    local: ClassVar[bool] = False
    errors: ClassVar[tuple[ErrorSource, ...]] = ("output",)
