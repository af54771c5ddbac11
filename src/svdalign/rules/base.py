"""What a rule is: data, a teaching loss, and nothing about how it is streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factors import FactoredLayer
from ..feedback import Feedback

__all__ = ["ErrorSource", "Rule", "Teaching", "TeachingUnit"]

ErrorSource = Literal["output", "local", "target"]
ERROR_SOURCES: tuple[str, ...] = get_args(ErrorSource)


@dataclass(frozen=True)
class TeachingUnit:
    """What a rule may know of a unit.

    ``features_shape``: shape of its output for the example batch. ``output_shape``: the same for
    the network's output. ``layers``: its factored layers in order of execution.
    """

    name: str
    features_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    layers: tuple[FactoredLayer, ...]


@dataclass(frozen=True)
class Teaching:
    """What a batch offers to teach with.

    ``targets``: as given to the learner. ``loss``: the task loss ``(z, targets) -> 0-dim``.
    ``error``: ``dL/dz`` at the network's output, or None where the rule does not ask for it.
    ``output_shape``: shape of the network's output.
    """

    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Tensor | None
    output_shape: tuple[int, ...]

    def target_matrix(self) -> Tensor:
        """Targets as numbers of the output's shape: one-hot where they are class indices."""
        if self.targets.dtype == torch.int64:
            if len(self.output_shape) == 4:
                return F.one_hot(self.targets, self.output_shape[1]).movedim(-1, 1).float()
            return F.one_hot(self.targets, self.output_shape[-1]).float()
        return self.targets.float()


@dataclass(frozen=True)
class Rule:
    """A learning rule. Subclasses say in :meth:`loss` what teaches a unit.

    ``horizon``: how many units upstream a unit's gradient travels; None is backpropagation.
    ``error``: where the error comes from (``"output"`` makes the engine run a first pass for it).
    """

    name: str = field(kw_only=True)
    horizon: int | None = field(default=0, kw_only=True)
    error: ErrorSource = field(default="output", kw_only=True)

    def __post_init__(self) -> None:
        if self.error not in ERROR_SOURCES:
            raise ValueError(f"error must be one of {ERROR_SOURCES}, got {self.error!r}")
        h = self.horizon
        if h is not None and (isinstance(h, bool) or not isinstance(h, int) or h < 0):
            raise ValueError(
                f"horizon must be a whole number of at least 0 or None (backpropagation), got {h!r}"
            )

    def feedback(self, unit: TeachingUnit, generator: torch.Generator) -> nn.Module | None:
        """The module that holds the unit's feedback, or None if the rule needs none."""
        return None

    def loss(
        self, unit: TeachingUnit, feedback: nn.Module | None, h: Tensor, teaching: Teaching
    ) -> Tensor:
        """The unit's loss on its output ``h``, 0-dim. Its gradient at ``h`` is the teaching signal;
        its gradient in the feedback's parameters teaches the feedback."""
        raise NotImplementedError(f"rule {self.name!r} has no local loss: it needs horizon=None")

    def weights_loss(self, unit: TeachingUnit, feedback: nn.Module | None) -> Tensor | None:
        """A loss on the unit's own factors, 0-dim, or None if the rule has none."""
        return None

    def transport(self, model: nn.Module, generator: torch.Generator) -> nn.Module | None:
        """A module of weights that carry errors backwards in place of the model's, or None."""
        return None

    def transporting(self, model: nn.Module, transport: nn.Module) -> AbstractContextManager[None]:
        """While active, ``model``'s layers send errors through ``transport``."""
        return contextlib.nullcontext()


def task_loss(error: ErrorSource, feedback: Feedback, pooled: Tensor, teaching: Teaching) -> Tensor:
    """The loss whose gradient at the pooled features ``p`` is ``B e``.

    With the readout ``z = B^T p``: ``<z, e>`` for the output's error, ``<z, -y> / batch`` for the
    target alone, and the task's own loss of ``z`` for the local error.
    """
    z = feedback.readout(pooled)
    if error == "local":
        return teaching.loss(_like_output(z, teaching.output_shape), teaching.targets)
    if error == "output":
        assert teaching.error is not None, "the engine brings the output's error"
        e = teaching.error
    else:
        e = -teaching.target_matrix() / len(teaching.targets)
    return (_like_output(z, teaching.output_shape) * e).sum()


def _like_output(z: Tensor, output_shape: tuple[int, ...]) -> Tensor:
    """A readout as the network's output is laid out: pixels to (B, C, H, W), at its resolution."""
    if len(output_shape) == 4:
        z = z.permute(0, 3, 1, 2)
        if z.shape[2:] != output_shape[2:]:
            z = F.interpolate(z, size=output_shape[2:], mode="bilinear", align_corners=False)
    return z


def feedback_channels(
    unit: TeachingUnit, feedback: Feedback, layer: FactoredLayer
) -> Tensor | None:
    """The feedback's directions in the output channel space of ``layer``, (N, f), or None where the
    pooled features are not laid out by that layer's channels."""
    N, directions = layer.output_directions().shape[0], feedback.directions()
    if unit.features_shape[1 if len(unit.features_shape) == 4 else -1] != N or len(directions) % N:
        return None
    return directions.reshape(N, -1)


def weights_of(layers: Sequence[FactoredLayer]) -> list[Tensor]:
    """The factors of ``layers`` that live on the Stiefel manifold."""
    return [X for layer in layers for X in (layer.U, layer.V)]
