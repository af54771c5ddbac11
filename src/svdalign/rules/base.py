"""The base of all rules, and what a rule gets to know of a unit and of a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._map_statistics import accumulation_dtype, grid_means_and_spread
from ..factors import FactoredLayer
from ..feedback import Feedback, grid_size, pool, pooled_size
from ..losses import (
    Directions,
    channel_statistics,
    directions,
    hoyer_sparsity,
    orthogonality_penalty,
    subspace_share,
)
from ..task import Loss, Task, width

ErrorSource = Literal["output", "local", "target"]


@dataclass(frozen=True)
class UnitSpec:
    """A unit as a rule sees it.

    ``features_shape``: shape of its output for the example batch, as (B, d), (B, T, d) or
    (B, C, h, w), whatever the model's own order of axes. ``output_shape``: the same for the
    network's output. ``layers``: its factored layers in order of execution. ``dtype``: precision of
    the weights, and of what feedback reads. ``penalised``: the layers whose factors this unit
    penalises, all by default; a layer that several units call is penalised by the first.
    """

    name: str
    features_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    layers: tuple[FactoredLayer, ...]
    dtype: torch.dtype = torch.float32
    penalised: tuple[FactoredLayer, ...] | None = None

    @property
    def classes(self) -> int:
        """The number of classes in the network's output: 1 for (B,), C of (B, C, H, W), else the
        size of its last axis."""
        return width(self.output_shape)

    def pool(self, h: Tensor, grid: int | None) -> Tensor:
        """The features ``h`` as rows (..., d) for a feedback matrix, see :func:`feedback.pool`.
        With ``grid`` a map of any size is pooled to as many cells as the example's."""
        return pool(h, grid, self._rows(h.shape), self.dtype, like=self.features_shape)

    def pool_and_statistics(self, h: Tensor, grid: int | None) -> tuple[Tensor, Tensor]:
        """:meth:`pool` and :func:`losses.channel_statistics` (B, d) of ``h``, for a map in one
        pass."""
        size = grid_size(self.features_shape, grid, self.output_shape)
        if size is None or h.shape[2] * h.shape[3] == 1:
            pooled = self.pool(h, grid)
            both = h.ndim == 3 and pooled.ndim == 2 and pooled.dtype == accumulation_dtype(h.dtype)
            return pooled, pooled if both else channel_statistics(h)  # the mean over tokens
        pooled, spread = grid_means_and_spread(h, size, self.dtype)
        return pooled.flatten(1), spread

    def pooled_size(self, grid: int | None) -> int:
        """``d``: the last dimension of :meth:`pool`."""
        return pooled_size(self.features_shape, grid, self._rows(self.features_shape))

    def _rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        # Batches differ in length; whether answers are per token was settled by the example.
        output = self.output_shape
        if len(output) != 3:
            return output
        per_token = len(self.features_shape) == 3 and self.features_shape[1] == output[1]
        return (shape[0], shape[1], output[2]) if per_token else (shape[0], output[2])


@dataclass(frozen=True)
class Supervision:
    """What a unit can learn from in a batch.

    ``targets``: as given to the learner. ``loss``: the task loss ``(z, targets) -> 0-dim``.
    ``error``: ``dL/dz`` at the network's output, or None where the rule does not ask for it.
    ``task``: what the targets are. ``space``: of a volume the size (d, h, w), which rules see as
    (d h, w).
    """

    targets: Tensor
    loss: Loss
    error: Tensor | None
    task: Task
    space: tuple[int, ...] | None = None
    _directions: dict[torch.dtype, Directions] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the network's output for the example, in the model's own layout."""
        return self.task.output_shape

    def target_matrix(self) -> Tensor:
        """Targets as numbers of the output's own layout: one-hot where they are class indices, with
        zeros for those that the loss ignores."""
        t, shape, axis = self.targets, self.output_shape, self.task.output.axis
        if self.task.are_indices(t):
            index = t.long().clamp(0, self.task.classes - 1).unsqueeze(axis)
            size = list(index.shape)
            size[axis] = self.task.classes
            hot = torch.zeros(size, device=t.device)
            return hot.scatter_(axis, index, self.task.counted(t).unsqueeze(axis).to(hot.dtype))
        if t.ndim == len(shape) and (t.ndim < 2 or t.shape[axis] == shape[axis]):
            return t.float()
        if t[0].numel() == math.prod(shape[1:]):
            return t.float().reshape(len(t), *shape[1:])
        raise ValueError(
            f"targets of shape {tuple(t.shape)} are not of the layout of the network's output, "
            f"{shape}, which a rule that reads targets as numbers needs"
        )

    def target_directions(self, dtype: torch.dtype) -> Directions:
        """:func:`losses.directions` of the targets, in ``dtype``: once for all units."""
        if dtype not in self._directions:
            self._directions[dtype] = directions(self.target_matrix().to(dtype))
        return self._directions[dtype]

    def like_output(self, z: Tensor) -> Tensor:
        """A readout (..., classes) in the layout of the network's output. A map is resized to the
        output's resolution; one answer a sample is repeated for each token or pixel."""
        output = self.task.output
        if len(output.shape) == 1:
            return z.squeeze(-1)
        if len(output.shape) == 2:
            return z
        places, classes = self._places(), z.shape[-1]
        if z.ndim == 2:
            z = z.reshape(len(z), *[1] * len(places), classes).expand(-1, *places, -1)
        elif len(places) > 1:
            z = z.reshape(len(z), *(self.space or z.shape[1:-1]), classes)
            if z.shape[1:-1] != places:
                mode = {2: "bilinear", 3: "trilinear"}[len(places)]
                z = F.interpolate(z.movedim(-1, 1), size=places, mode=mode).movedim(1, -1)
        return z.movedim(-1, output.axis)

    def _places(self) -> tuple[int, ...]:
        """Sizes of the output's axes of places for this batch."""
        output, like = self.task.output, self.targets if self.error is None else self.error
        if like.ndim == len(output.shape):
            return replace(output, shape=tuple(like.shape)).places
        if like.ndim == len(output.shape) - 1:
            return tuple(like.shape[1:])
        return output.places


@dataclass(frozen=True)
class Rule:
    """A learning rule. Subclasses say in :meth:`loss` what teaches a unit.

    ``horizon``: how many units upstream a unit's gradient travels; None is backpropagation.
    ``error``: where the error comes from (``"output"`` makes the engine run a first pass for it).
    ``beta``, ``gamma``: weights of the orthogonality penalty and of Hoyer sparsity on the unit's
    factors, which any rule can have.

    Attributes of its class tell the engine what a rule needs. ``local``: it has a local loss, so it
    works with a horizon. ``errors``: the sources of errors that it can use.
    ``needs_affine_layers``: every layer must be affine in its input, which fused ones are not.
    """

    local: ClassVar[bool] = True
    errors: ClassVar[tuple[ErrorSource, ...]] = get_args(ErrorSource)
    needs_affine_layers: ClassVar[bool] = False

    name: str = field(kw_only=True)
    horizon: int | None = field(default=0, kw_only=True)
    error: ErrorSource = field(default="output", kw_only=True)
    beta: float = field(default=0.0, kw_only=True)
    gamma: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.error not in self.errors:
            allowed = "one of " * (len(self.errors) > 1) + ", ".join(map(repr, self.errors))
            raise ValueError(f"error must be {allowed} for rule {self.name!r}, got {self.error!r}")
        h = self.horizon
        if h is not None and (isinstance(h, bool) or not isinstance(h, int) or h < 0):
            raise ValueError(
                f"horizon must be a whole number of at least 0 or None (backpropagation), got {h!r}"
            )
        if not self.local and h is not None:
            raise ValueError(
                f"rule {self.name!r} carries errors through every layer: horizon must be None, "
                f"got {h}"
            )
        check_weights(beta=self.beta, gamma=self.gamma)

    def feedback(self, unit: UnitSpec, generator: torch.Generator) -> nn.Module | None:
        """The module that holds the unit's feedback, or None if the rule needs none."""
        return None

    def loss(self, unit: UnitSpec, feedback: Any, h: Tensor, supervision: Supervision) -> Tensor:
        """The unit's loss on its output ``h``, 0-dim; ``feedback`` is what :meth:`feedback` made.

        Its gradient at ``h`` is the teaching signal; its gradient in the feedback's parameters
        teaches the feedback. Under autocast ``h`` may be in half precision, too coarse for sums;
        ``unit.pool(h, grid)`` is in ``unit.dtype``.
        """
        raise NotImplementedError(f"rule {self.name!r} has no local loss: it needs horizon=None")

    def readout(self, unit: UnitSpec, feedback: Any, h: Tensor) -> Tensor | None:
        """``B^T P(h)``, (..., classes), whose Jacobian in ``h`` is the transpose of what brings an
        error back; None if the rule's feedback is no such matrix. For measurements."""
        return None

    def weights_loss(self, unit: UnitSpec, feedback: Any) -> Tensor | None:
        """A loss on the unit's own factors, 0-dim, or None if the rule has none."""
        terms = []
        layers = unit.layers if unit.penalised is None else unit.penalised
        if self.beta and layers:
            factors = [X for layer in layers for X in (layer.U, layer.V)]
            terms.append(self.beta * orthogonality_penalty(*factors))
        if self.gamma:
            terms += [self.gamma * hoyer_sparsity(layer.s) for layer in layers]
        return torch.stack(terms).sum() if terms else None

    def transport(self, model: nn.Module, generator: torch.Generator) -> nn.Module | None:
        """A module of weights that carry errors backwards in place of the model's, or None."""
        return None

    def transporting(self, model: nn.Module, transport: nn.Module) -> AbstractContextManager[None]:
        """While active, ``model``'s layers send errors through ``transport``."""
        return contextlib.nullcontext()


def task_loss(
    error: ErrorSource, feedback: Feedback, pooled: Tensor, supervision: Supervision
) -> Tensor:
    """The loss whose gradient at the pooled features ``p`` is ``B e``.

    With the readout ``z = B^T p``: ``<z, e>`` for the output's error, ``<z, -y> / batch`` for the
    target alone, and the task's own loss of ``z`` for the local error.
    """
    z = feedback.readout(pooled)
    if error == "local":
        return supervision.loss(supervision.like_output(z), supervision.targets)
    if error == "output":
        assert supervision.error is not None, "the engine brings the output's error"
        e = supervision.error
    else:
        e = -supervision.target_matrix() / len(supervision.targets)
    answers = supervision.like_output(z)
    if answers.shape != e.shape:
        raise ValueError(
            f"y must hold a target for every answer, of shape {tuple(answers.shape)}, got "
            f"{tuple(e.shape)}"
        )
    return (answers * e).sum()


def add_missed_share(
    loss: Tensor | None, weight: float, unit: UnitSpec, feedback: Feedback | None
) -> Tensor | None:
    """``loss`` plus ``weight`` times the share of the feedback's directions that the unit's last
    layer cannot receive, see :func:`losses.subspace_share`.

    The share is left out for a unit without such a layer or without feedback, and where the pooled
    features are not laid out by the layer's channels.
    """
    if not weight or not unit.layers or feedback is None:
        return loss
    output, directions = unit.layers[-1].output_directions(), feedback.directions().detach()
    N = len(output)
    if unit.features_shape[1 if len(unit.features_shape) == 4 else -1] != N or len(directions) % N:
        return loss
    missed = weight * subspace_share(output, directions.reshape(N, -1))
    return missed if loss is None else loss + missed


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value of the option ``name`` that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are neither None nor a whole number of at least 1."""
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1 or None, got {value!r}")


def check_weights(**weights: float) -> None:
    """Refuse weights of loss terms that are no numbers, negative or NaN."""
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
