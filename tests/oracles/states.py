"""Whether two runs left the same: bit for bit, but for what a clock measured."""

from __future__ import annotations

from typing import Any

import torch

CLOCKS = {"seconds", "epoch_seconds", "images_per_second"}


def timeless(value: Any) -> Any:
    """Without what a clock measured."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
