"""Angles between a rule's gradients and those of backpropagation; training is not disturbed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._structures import leaves
from ._tracing import watching
from .engine import Learner, Unit
from .engine.forward import evaluating, forward, preserved
from .factors import FactoredLayer, factored_layers


@dataclass(frozen=True)
class LayerAlignment:
    """One layer's gradient under the rule against its gradient under backpropagation.

    Angles in degrees. ``factor_angle``: between the gradients of the layer's parameters, (U, s, V)
    or the dense weight. ``tangent_angle``: between the changes of ``W`` to first order that steps
    along the two gradients make, ``dU diag(s) V^T + U diag(ds) V^T + U diag(s) dV^T``.
    ``norm_ratio``: norm of the rule's gradient over norm of backpropagation's.
    """

    name: str
    factor_angle: float
    tangent_angle: float
    norm_ratio: float


@dataclass(frozen=True)
class UnitAlignment:
    """``feedback_angle``, in degrees: between the matrix that brings errors back to a unit's output
    and the transposed Jacobian of the logits in that output, averaged over the batch."""

    name: str
    feedback_angle: float


@dataclass(frozen=True)
class Alignment:
    """``cosine``: of the angle between the two gradients over all parameters. ``descent``: whether
    the rule's gradient points downhill on the global loss, ``<g, g_BP> > 0``."""

    layers: tuple[LayerAlignment, ...]
    units: tuple[UnitAlignment, ...]
    cosine: float

    @property
    def descent(self) -> bool:
        return self.cosine > 0


@dataclass(frozen=True)
class Descent:
    """How often ``<g, g_BP> > 0``, as a share; NaN where there was nothing to compare.

    ``steps``: share of the batches, with ``g`` the whole gradient. ``layers``: share of all pairs
    of a batch and a hidden layer, with ``g`` the gradient of that layer's parameters. The layers of
    the last unit, which learn from the task's exact gradient, are left out, unless the rule is
    backpropagation."""

    steps: float
    layers: float


def alignment(model: nn.Module, learner: Learner, x: Any, y: Tensor) -> Alignment:
    """Measure ``learner``'s rule on a batch against backpropagation through ``model``.

    Both gradients start from the same random state. Parameters, gradients, buffers and random state
    are left as they were. The Jacobian is computed in evaluation mode, where samples do not
    influence each other, by one backward pass for each class.

    Args:
        model: the learner's model.
        learner: the one whose rule is measured.
        x: a batch of inputs, as for :meth:`svdalign.Learner.step`.
        y: its targets.

    Returns:
        Angles in degrees: for each layer between the two gradients, for each unit between its
        feedback matrix and the forward path, and the cosine over all parameters.

    Raises:
        TypeError: for a ``learner`` that is none.
        ValueError: for a ``learner`` of another model.

    Source: arXiv 2510.25594, figures 2 and 3.
    """
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a svdalign.Learner, got {type(learner).__name__}")
    if model is not learner.model:
        raise ValueError(
            "learner must be the one that trains model, got a learner of another model"
        )
    rule, bp = learner.gradients(x, y), _backpropagation(learner, x, y)
    layers = tuple(_layers(model, rule, bp))
    return Alignment(layers, tuple(_units(learner, x)), _cosine_of_common(rule, bp))


def descent(learner: Learner, batches: Iterable[tuple[Any, Tensor]]) -> Descent:
    """How often ``learner``'s gradients on ``batches`` point downhill on the global loss. Training
    is not disturbed."""
    whole = learner.horizon is None
    taught_by_the_task = set() if whole else set(learner.plan.output.parameters)
    steps, layers = [], []
    for x, y in batches:
        rule, bp = learner.gradients(x, y), _backpropagation(learner, x, y)
        steps.append(_cosine_of_common(rule, bp) > 0)
        hidden = {name: grad for name, grad in rule.items() if name not in taught_by_the_task}
        layers += [layer.factor_angle < 90 for layer in _layers(learner.model, hidden, bp)]
    return Descent(_share(steps), _share(layers))


def _share(answers: Sequence[bool]) -> float:
    return sum(answers) / len(answers) if answers else math.nan


def _cosine_of_common(rule: Mapping[str, Tensor], bp: Mapping[str, Tensor]) -> float:
    """Cosine over all parameters for which both have a gradient."""
    names = [name for name in bp if name in rule]
    return _cosine([rule[n] for n in names], [bp[n] for n in names])


def _backpropagation(learner: Learner, x: Any, y: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in learner.model.named_parameters() if p.requires_grad}
    with preserved(learner.model), torch.enable_grad():
        loss = learner.loss(forward(learner.model, x), y)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def _layers(
    model: nn.Module, rule: Mapping[str, Tensor], bp: Mapping[str, Tensor]
) -> Iterator[LayerAlignment]:
    factored = factored_layers(model)
    for name, _ in model.named_modules():
        prefix = f"{name}." if name else ""
        own = ("U", "s", "V") if name in factored else ("weight",)
        keys = [prefix + k for k in own if prefix + k in rule and prefix + k in bp]
        if not keys or any(rule[k].ndim < 2 for k in keys if not k.endswith("s")):
            continue  # norms have no matrix to align
        ours, theirs = [rule[k] for k in keys], [bp[k] for k in keys]
        angle = _angle(_cosine(ours, theirs))
        tangent = angle
        if name in factored and len(keys) == 3:
            changes = [_change(factored[name], *gradients) for gradients in (ours, theirs)]
            tangent = _angle(_cosine(changes[:1], changes[1:]))
        yield LayerAlignment(name, angle, tangent, float(_norm(ours) / _norm(theirs)))


def _change(layer: FactoredLayer, dU: Tensor, ds: Tensor, dV: Tensor) -> Tensor:
    """First-order change (m, n) of ``U diag(s) V^T`` along a change of its factors."""
    U, s, V = layer.U.detach(), layer.s.detach(), layer.V.detach()
    return (dU * s) @ V.mT + (U * ds) @ V.mT + (U * s) @ dV.mT


def _units(learner: Learner, x: Any) -> list[UnitAlignment]:
    outputs: dict[str, Tensor] = {}
    units = {(unit.exit, unit.call): unit for unit in learner.units[:-1]}
    calls: Counter[str] = Counter()

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (unit := units.get((path, calls[path]))) is not None:
                outputs[unit.name] = leaves(output)[unit.features[0].index]
            calls[path] += 1

        return hook

    model = learner.model
    hooks = [model.get_submodule(p).register_forward_hook(keep(p)) for p in learner.plan.exits]
    with preserved(model), torch.enable_grad():
        with watching(hooks), evaluating(model):
            z = forward(model, x)
        if z.ndim != 2:
            return []  # only with one answer a sample is the Jacobian one matrix a sample
        found = []
        for unit in learner.units[:-1]:
            h = outputs.get(unit.name)
            readout = None if h is None or not h.requires_grad else _readout(learner, unit, h)
            if h is not None and readout is not None:
                ours, theirs = _jacobian(readout[1], readout[0]), _jacobian(z, h)
                cosines = torch.cosine_similarity(ours.flatten(1), theirs.flatten(1), dim=1)
                found.append(UnitAlignment(unit.name, _angle(float(cosines.mean()))))
        return found


def _readout(learner: Learner, unit: Unit, h: Tensor) -> tuple[Tensor, Tensor] | None:
    """The unit's features as a leaf, and the rule's linear readout of them."""
    feedback = learner.feedback_of(unit)
    if feedback is None:
        return None
    leaf = h.detach().requires_grad_()
    with torch.enable_grad():
        out = learner.rule.readout(learner.unit_spec(unit), feedback, unit.features[0].layout(leaf))
    return None if out is None else (leaf, out)


def _jacobian(z: Tensor, h: Tensor) -> Tensor:
    """Jacobians (B, C, d) of ``z`` (B, C) in ``h`` (B, ...), by one backward pass for each
    class."""
    rows = [torch.autograd.grad(z[:, c].sum(), h, retain_graph=True)[0] for c in range(z.shape[1])]
    return torch.stack([row.flatten(1) for row in rows], dim=1)


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    dot = sum((p.double() * q.double()).sum() for p, q in zip(a, b, strict=True))
    return float(dot / (_norm(a) * _norm(b)).clamp_min(torch.finfo(torch.float64).tiny))


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def _angle(cosine: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
