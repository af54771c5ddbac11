"""The loss of each unit, as the rule has it, and the feedback that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._autocast import outside_autocast
from ..factors import FactoredLayer, factored_layers
from ..rules import Rule, Supervision, UnitSpec
from .checks import check_scalar
from .layout import with_channels_at
from .ownership import depends
from .units import Plan, Unit


class LocalLosses:
    """The losses that ``rule`` gives the units of ``plan``.

    ``feedback``: the modules that bring errors to the units; none where the rule backpropagates,
    nor for the last unit, which the task teaches. ``dtype``: that of the weights.
    """

    def __init__(
        self, rule: Rule, model: nn.Module, plan: Plan, generator: torch.Generator
    ) -> None:
        self.rule, self.plan = rule, plan
        self.feedback = nn.ModuleDict()
        self._specs: dict[str, list[UnitSpec]] = {}
        self._index = {unit.name: i for i, unit in enumerate(plan.units)}
        self._checked: set[str] = set()  # units whose losses have been looked at
        trained = [p for p in model.parameters() if p.requires_grad]
        first = min(trained, key=lambda p: p.is_complex())  # feedback is real
        self.dtype = first.dtype
        factored = factored_layers(model)
        penalised: set[FactoredLayer] = set()
        output_layout = with_channels_at(plan.output_axis, len(plan.output_shape))
        output_shape = output_layout.shape(plan.output_shape)
        for unit in plan.units:
            owners = dict.fromkeys(name.rpartition(".")[0] for name in unit.parameters)
            layers = tuple(factored[owner] for owner in owners if owner in factored)
            penalty = tuple(layer for layer in layers if layer not in penalised)
            penalised.update(layers)
            self._specs[unit.name] = [
                UnitSpec(unit.name, f.shape, output_shape, layers, self.dtype, penalty)
                for f in unit.features
            ]
            if unit is plan.output or rule.horizon is None:
                continue
            for i, spec in enumerate(self._specs[unit.name]):
                feedback = rule.feedback(spec, generator)
                if feedback is not None:
                    self.feedback[self._key(unit, i)] = feedback.to(first.device, first.dtype)

    def spec(self, unit: Unit, feature: int = 0) -> UnitSpec:
        """``unit`` as the rule sees it."""
        return self._specs[unit.name][feature]

    def feedback_of(self, unit: Unit, feature: int = 0) -> nn.Module | None:
        """The module that brings errors to this feature of ``unit``, None if there is none."""
        key = self._key(unit, feature)
        return self.feedback[key] if key in self.feedback else None  # noqa: SIM401 (no get)

    def feedback_parameters(self, unit: Unit) -> list[Tensor]:
        """Parameters of the feedback of all features of ``unit``."""
        found = [self.feedback_of(unit, i) for i in range(len(unit.features))]
        return [p for feedback in found if feedback is not None for p in feedback.parameters()]

    @property
    def need_output_error(self) -> bool:
        """Whether a first pass has to find the error of the network's output."""
        return self.rule.error == "output" and len(self.feedback) > 0

    def loss(self, unit: Unit, features: dict[int, Tensor], supervision: Supervision) -> Tensor:
        """The loss of ``unit``, 0-dim: the sum of the rule's losses on its ``features``."""
        losses = [self._loss(unit, i, h, supervision) for i, h in features.items()]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _loss(self, unit: Unit, i: int, h: Tensor, supervision: Supervision) -> Tensor:
        must = f"the loss of rule {self.rule.name!r} must be 0-dim and depend on h"
        layout = unit.features[i].layout
        shown = layout(h)
        self._check_output(unit, shown, supervision)
        space = layout.space(h)  # of a volume, which rules see as a map
        found = self.rule.loss(
            self.spec(unit, i),
            self.feedback_of(unit, i),
            shown,
            supervision if len(space) < 3 else replace(supervision, space=space),
        )
        loss = check_scalar(must, found)
        if unit.name not in self._checked and not depends(loss, h):
            raise ValueError(f"{must}, got one that does not")
        self._checked.add(unit.name)
        return loss

    def _check_output(self, unit: Unit, h: Tensor, supervision: Supervision) -> None:
        if h.is_complex():
            raise ValueError(
                f"unit {unit.name!r} puts out complex numbers, from which rule {self.rule.name!r} "
                "does not learn: end units where outputs are real, with units= a list of module "
                "names"
            )
        if supervision.task.one_class_a_sample and len(h) != len(supervision.targets):
            raise ValueError(
                f"unit {unit.name!r} puts out {len(h)} samples for a batch of "
                f"{len(supervision.targets)}, as an expert does that gets a part of the batch: "
                "end units elsewhere, with units= a list of module names"
            )

    def add_weight_gradients(self, unit: Unit, scale: Callable[[Tensor], Tensor]) -> None:
        """Add to ``.grad`` the gradients of the rule's loss on the factors of ``unit``."""
        spec = self.spec(unit)
        if not spec.layers:
            return
        with outside_autocast():
            loss = self.rule.weights_loss(spec, self.feedback_of(unit))
        if loss is None or not loss.requires_grad:
            return
        factors = [X for layer in spec.layers for X in (layer.U, layer.s, layer.V)]
        factors = [X for X in factors if X.requires_grad]
        grads = torch.autograd.grad(scale(loss), factors, allow_unused=True)
        for parameter, grad in zip(factors, grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def _key(self, unit: Unit, feature: int) -> str:
        """The key of a feedback: that of a unit's only feature is the unit's number."""
        index = self._index[unit.name]
        return f"{index}_{feature}" if feature else str(index)
