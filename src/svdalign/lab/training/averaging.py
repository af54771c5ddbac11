"""Weights pulled to their moving average while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lookahead:
    """Every ``period`` steps the average moves towards the weights, which are then set to it.

    The share of itself that the average keeps grows with the third power of training's progress, up
    to ``0.95 ** period``; after the last step the weights are set to the average as it is. Floating
    point buffers, such as running statistics, are averaged as well. After Jordan 2024, who follows
    Zhang et al., *Lookahead Optimizer* (2019).

    ``average``: tensors by their names in the model's state.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self.period = period
        self.average: dict[str, Tensor] = {}
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Set the average to the present weights, for example after their shapes have changed."""
        self.average = {name: value.clone() for name, value in _floating(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, total: int) -> bool:
        """Average if it is time to after ``step`` of ``total`` steps. Returns whether it was."""
        last = step == total
        if step % self.period and not last:
            return False
        kept = 1.0 if last else 0.95**self.period * (step / total) ** 3
        for name, value in _floating(model).items():
            self.average[name].lerp_(value, 1 - kept)
            value.copy_(self.average[name])
        return True


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: v for name, v in model.state_dict().items() if v.is_floating_point()}
