"""What users hold: a model, a rule, an optimizer, and one method that takes a batch."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rules
from .._autocast import outside_autocast
from ..factors import FactoredLayer
from ..factors.stiefel import RETRACTIONS
from ..feedback import StructuredFeedback
from ..rules import Rule, Supervision, UnitSpec
from ..task import FOR_TOKENS, KINDS, Kind, Loss, Task, find_task
from .checks import check_input, check_model, check_scalar, check_trained
from .cuts import Units
from .forward import forward, preserved, values_of
from .ownership import depends, leaves_of, reached
from .plan import make_plan
from .recompute import recomputing
from .streaming import stream
from .units import OUTPUT, Plan, Unit

__all__ = ["Learner", "StepReport"]

Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepReport:
    """What one step saw, as tensors on the model's device: reading a value is up to the caller.

    ``loss``: task loss of the network's output. ``accuracy``: share of right
    answers among the targets that are not to be ignored, None where the task has no right and
    wrong. ``unit_losses``: each unit's own loss by its name; that of the last unit, ``"output"``,
    is ``loss``.
    """

    loss: Tensor
    accuracy: Tensor | None
    unit_losses: dict[str, Tensor]


class _Default:
    def __repr__(self) -> str:
        return "the rule's own"


_DEFAULT: Any = _Default()


class Learner:
    """Trains ``model`` by ``rule``, unit by unit.

    ``model``: any ``nn.Module``, factored or dense; it is trained in place and its ``forward`` is
    used as it is. ``rule``: a name (:func:`svdalign.rules.available`) or a :class:`Rule`;
    ``horizon`` and ``error`` replace the rule's own. ``units``: where units end, see
    :func:`make_plan`. ``optimizer``: called with the list of parameters to train, learned feedback
    included; returns the optimizer. ``example``: a batch of inputs. ``loss``: ``(z, y) -> 0-dim
    tensor``, a mean over the batch; cross-entropy by default. ``task``: what the targets are, a
    kind of :class:`svdalign.task.Task`; found from the first batch by default, by ``loss`` being
    called on small outputs. ``retraction``: "qr", "polar", "newton-schulz" (for small steps) or
    None, brings ``U`` and ``V`` back onto the manifold after every ``retract_every`` steps.
    ``recompute``: residual or transformer blocks (layers where there are none) hold their inputs
    alone and run again for their gradients, once for each unit of the horizon and once more.
    ``seed``: of the feedback's random matrices.

    Raises TypeError or ValueError that name the argument when something does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "ssa",
        *,
        units: Units = "block",
        horizon: int | None = _DEFAULT,
        error: rules.ErrorSource = _DEFAULT,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        example: Any,
        loss: Loss | None = None,
        task: Kind | None = None,
        retraction: str | None = "qr",
        retract_every: int = 1,
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        if retraction is not None and retraction not in RETRACTIONS:
            raise ValueError(
                f"retraction must be one of {sorted(RETRACTIONS)} or None, got {retraction!r}"
            )
        if (
            isinstance(retract_every, bool)
            or not isinstance(retract_every, int)
            or retract_every < 1
        ):
            raise ValueError(
                f"retract_every must be a whole number of at least 1, got {retract_every!r}"
            )
        if not callable(optimizer):
            raise TypeError(
                "optimizer must be called with the parameters to train, among them those of the "
                "feedback, such as lambda p: torch.optim.AdamW(p, 1e-3), "
                f"got {type(optimizer).__name__}"
            )
        changes: dict[str, Any] = {"horizon": horizon, "error": error}
        self.rule = replace(
            rules.get(rule), **{k: v for k, v in changes.items() if v is not _DEFAULT}
        )
        check_model(model, units=self.horizon is not None)
        check_input("example", example)
        self.model = model
        if task is not None and task not in KINDS:
            raise ValueError(f"task must be one of {KINDS} or None, got {task!r}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be called with (z, y), got {type(loss).__name__}")
        self.loss: Loss = F.cross_entropy if loss is None else loss
        self.task: Task | None = None  # found from the first batch
        self._kind: Kind | None = "classes" if loss is None and task is None else task
        self.retraction, self.retract_every = retraction, retract_every
        self.steps = 0
        # What training on several processes replaces (svdalign.parallel).
        self._one_pass: Callable[..., Tensor | None] = stream
        self._retired: Callable[[Unit, list[Tensor]], None] = lambda unit, parameters: None
        self._known: set[str] = set()  # units whose losses have been looked at
        self.plan: Plan = make_plan(model, units, example, whole=self.horizon is None)
        self.recompute = recompute
        if self.plan.unreached and self.horizon is not None:
            warnings.warn(
                "these parameters do not reach the network's output for the example, and learn "
                f"only from batches for which they do: {self.plan.unreached}",
                stacklevel=2,
            )
        generator = torch.Generator().manual_seed(seed)
        first = next(p for p in model.parameters() if p.requires_grad)
        self._dtype = first.dtype
        self.feedback = nn.ModuleDict()
        self._unit_specs: dict[str, list[UnitSpec]] = {}
        penalised: set[FactoredLayer] = set()
        for i, unit in enumerate(self.plan.units):
            layers = tuple(_layers(model, unit))
            penalty = tuple(layer for layer in layers if layer not in penalised)
            penalised.update(layers)
            self._unit_specs[unit.name] = [
                UnitSpec(unit.name, f.shape, self.plan.output_shape, layers, self._dtype, penalty)
                for f in unit.features
            ]
            if unit is self.plan.output or self.horizon is None:
                continue
            for k, spec in enumerate(self._unit_specs[unit.name]):
                feedback = self.rule.feedback(spec, generator)
                if feedback is not None:
                    self.feedback[_key(i, k)] = feedback.to(first.device, first.dtype)
        self._on_the_manifold = [
            module
            for module in (*model.modules(), *self.feedback.modules())
            if isinstance(module, FactoredLayer | StructuredFeedback)
        ]
        self._ranks = {m: m.rank for m in self._on_the_manifold if isinstance(m, FactoredLayer)}
        self.transport = self.rule.transport(model, generator)
        self._index = {unit.name: i for i, unit in enumerate(self.plan.units)}
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer([*parameters, *self.feedback.parameters()])
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be called with parameters and return a torch.optim.Optimizer, "
                f"got {self.optimizer!r}"
            )
        # Of a loss that is no module they are found when it is called.
        self._loss_parameters: tuple[Tensor, ...] = ()
        if isinstance(self.loss, nn.Module):
            of_model = set(model.parameters())
            own = [p for p in self.loss.parameters() if p.requires_grad and p not in of_model]
            self._loss_parameters = check_trained(own, self.optimizer)

    def __repr__(self) -> str:
        task = "found from the first batch" if self.task is None else str(self.task)
        units = ", ".join(unit.name for unit in self.units)
        return (
            f"Learner of {type(self.model).__name__}\n"
            f"  rule: {self.rule}\n"
            f"  task: {task if self._kind is None or self.task else self._kind}\n"
            f"  units: {units}\n"
            f"  optimizer: {type(self.optimizer).__name__}\n"
            f"  steps: {self.steps}"
        )

    @property
    def horizon(self) -> int | None:
        """How many units upstream a unit's gradient travels; None is backpropagation."""
        return self.rule.horizon

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units in order of execution; the last one leads to the network's output."""
        return self.plan.units

    def feedback_of(self, unit: Unit, feature: int = 0) -> nn.Module | None:
        """The module that brings errors to ``unit``, None where the rule has none. ``feature``:
        which of the unit's features is meant, where there are several."""
        key = _key(self._index[unit.name], feature)
        return self.feedback[key] if key in self.feedback else None  # noqa: SIM401 (no get)

    def unit_spec(self, unit: Unit, feature: int = 0) -> UnitSpec:
        """``unit`` as the rule sees it."""
        return self._unit_specs[unit.name][feature]

    def step(self, x: Any, y: Tensor) -> StepReport:
        """Learn from one batch: gradients, optimizer step, retraction. Forces no host sync.

        ``x``: inputs laid out as ``example``, (B, ...) for most models; B may differ, and lengths
        and sizes of maps where the model and the rule's ``grid`` let them. ``y``: what ``loss``
        takes beside the output; for the default cross-entropy class indices (B,), (B, H, W) for
        an output (B, C, H, W), or probabilities of the output's shape.

        Raises TypeError for a ``y`` that is no tensor and ValueError for a batch that cannot be
        learned from, before anything changes: an empty one, ``x`` not finite or ``y`` out of range
        (of the first batch), ``y`` of a wrong dtype or length; RuntimeError for a module that is
        called more often than for the example.
        """
        reports: list[StepReport] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            reports.append(self.backward(x, y))
            return reports[-1].loss

        if _needs_closure(self.optimizer):
            self.optimizer.step(closure)  # type: ignore[arg-type]
            self.after_update()
        else:
            closure()
            self.update()
        return reports[0]

    def update(self) -> None:
        """The second half of :meth:`step`: the optimizer's step on the present gradients, and the
        retraction. Between :meth:`backward` and this is the place to clip gradients.

        Raises TypeError for an optimizer that evaluates the loss by itself, such as LBFGS."""
        if _needs_closure(self.optimizer):
            raise TypeError(
                f"{type(self.optimizer).__name__} evaluates the loss by itself: call "
                "learner.step(x, y), or learner.optimizer.step(closure) with a closure that calls "
                "learner.optimizer.zero_grad() and returns learner.backward(x, y).loss, then "
                "learner.after_update()"
            )
        self._check_ranks()
        self.optimizer.step()
        self.after_update()

    def _check_ranks(self) -> None:
        """Refuse to step an optimizer whose state is of ranks that the model no longer has."""
        for layer, before in self._ranks.items():
            for p in (layer.U, layer.s, layer.V) if layer.rank != before else ():
                stale = (*p.shape[:-1], before)
                state = self.optimizer.state.get(p, {}).values()
                if any(isinstance(value, Tensor) and value.shape == stale for value in state):
                    raise RuntimeError(
                        f"model's ranks were cut and the optimizer's state was not: a factor of "
                        f"shape {tuple(p.shape)} has state of shape {stale}; cut both by "
                        "reduce_rank(model, learner, ...), or clear learner.optimizer.state"
                    )
            self._ranks[layer] = layer.rank

    def after_update(self) -> None:
        """Retract the factors if it is time. For loops that call ``optimizer.step`` themselves."""
        self.steps += 1
        torch.clear_autocast_cache()  # of copies of the weights before the update
        if self.retraction is None or not self._on_the_manifold:
            return
        if self.steps % self.retract_every == 0:
            self.retract()

    def retract(self) -> None:
        """Bring the factors back onto the manifold, for who has changed them since the last step.
        Nothing is done without a ``retraction``."""
        if self.retraction is None:
            return
        retract = RETRACTIONS[self.retraction]
        with torch.no_grad(), outside_autocast():
            for X in self._stiefel_factors():
                self._move(X, retract(X))

    def _move(self, X: nn.Parameter, to: Tensor) -> None:
        # A schedule-free optimizer has a second copy of the weights, z, and evaluates with a mean
        # of both: what does not move one by one moves neither.
        z = self.optimizer.state.get(X, {}).get("z")
        if isinstance(z, Tensor) and z.shape == X.shape and self._is_schedule_free():
            z += (to - X).to(z.dtype)
        X.copy_(to)

    def _is_schedule_free(self) -> bool:
        return all("train_mode" in group for group in self.optimizer.param_groups)

    @torch.enable_grad()
    def backward(self, x: Any, y: Tensor, *, scale: Scale | None = None) -> StepReport:
        """Add this batch's gradients to the parameters' ``.grad``, without an update. ``x``, ``y``
        and errors are those of :meth:`step`.

        ``scale``: applied to every loss before its gradient is taken, such as
        ``lambda loss: loss / 4`` to accumulate four batches, or ``GradScaler.scale``; what is
        reported is not scaled.
        """
        self._check(x, y)
        scale = _unscaled if scale is None else scale
        if self.horizon is None:
            return self._backpropagate(x, y, scale)
        return self._stream(x, y, scale)

    def gradients(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """The rule's gradients for a batch, of each parameter's shape by its name; nothing is
        changed by the call. ``x``, ``y`` and errors are those of :meth:`step`."""
        named = dict(self.model.named_parameters())
        everything: list[Tensor] = [*named.values(), *self.feedback.parameters()]
        everything += self._loss_parameters
        saved = {p: p.grad for p in everything}
        for p in everything:
            p.grad = None
        try:
            with preserved(self.model):
                self.backward(x, y)
            return {name: p.grad for name, p in named.items() if p.grad is not None}
        finally:
            for p in (*everything, *self._loss_parameters):
                p.grad = saved.get(p)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: model, feedback, transport, optimizer, step count, and
        what the targets are."""
        return {
            "model": self.model.state_dict(),
            "feedback": self.feedback.state_dict(),
            "transport": {} if self.transport is None else self.transport.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, nn.Module) else {},
            "steps": self.steps,
            "units": [unit.name for unit in self.units],
            "task": self._kind if self.task is None else self.task.kind,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`; factored layers take the ranks that were saved.

        Raises ValueError for the state of a learner with other units."""
        self.check_units(state)
        self.model.load_state_dict(state["model"])
        self.feedback.load_state_dict(state["feedback"])
        if self.transport is not None:
            self.transport.load_state_dict(state["transport"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.loss, nn.Module) and "loss" in state:
            self.loss.load_state_dict(state["loss"])
        self.steps = state["steps"]
        if self._kind is None:
            self._kind, self.task = state.get("task"), None

    def check_units(self, state: Mapping[str, Any]) -> None:
        """ValueError if ``state``, of a :meth:`state_dict`, is that of a learner with other units:
        their feedback would not fit."""
        units = [unit.name for unit in self.units]
        if (saved := state.get("units", units)) != units:
            raise ValueError(f"state is of a learner with units {saved}, this one has {units}")

    # --- one batch ------------------------------------------------------------------------------

    def _backpropagate(self, x: Any, y: Tensor, scale: Scale) -> StepReport:
        carried = (
            contextlib.nullcontext()
            if self.transport is None
            else self.rule.transporting(self.model, self.transport)
        )
        with carried, self._recomputing():
            z = forward(self.model, x)
            loss = self._taught(z, y)
            with outside_autocast():
                scale(loss).backward()  # type: ignore[no-untyped-call]
        for unit in self.plan.units:
            self._finish(unit, scale)
        loss = loss.detach()
        return StepReport(loss, self._task.accuracy(z.detach(), y), {OUTPUT: loss})

    def _stream(self, x: Any, y: Tensor, scale: Scale) -> StepReport:
        assert self.horizon is not None
        needs_error = self.rule.error == "output" and len(self.feedback) > 0
        supervision = Supervision(
            y, self._loss, self._output_error(x, y) if needs_error else None, self._task
        )
        losses: dict[str, Tensor] = {}

        def unit_loss(unit: Unit, features: dict[int, Tensor]) -> Tensor:
            if unit is self.plan.output:
                loss = self._taught(features[0], y)
            else:
                each = [self._rule_loss(unit, i, h, supervision) for i, h in features.items()]
                loss = each[0] if len(each) == 1 else torch.stack(each).sum()
            losses[unit.name] = loss.detach()
            return scale(loss)

        def unit_backward(unit: Unit, heads: list[Tensor], planned: bool) -> None:
            if planned and not self.plan.unreached:
                parameters: list[Tensor] = [
                    self.model.get_parameter(name) for name in unit.parameters
                ]
            else:
                parameters = [*reached(heads, list(self.model.parameters()))]
            for i in range(len(unit.features)):
                if (feedback := self.feedback_of(unit, i)) is not None:
                    parameters += feedback.parameters()
            if unit is self.plan.output:
                parameters += self._loss_parameters
            parameters = [p for p in parameters if p.requires_grad]
            if parameters:
                torch.autograd.backward(heads, inputs=parameters)
            self._finish(unit, scale)
            self._retired(unit, parameters)

        with self._recomputing():
            z = self._one_pass(
                self.model,
                self.plan,
                x,
                horizon=self.horizon,
                unit_loss=unit_loss,
                unit_backward=unit_backward,
            )
        if z is None:  # another process has the units after these
            return StepReport(torch.full((), math.nan), None, losses)
        if OUTPUT not in losses:  # its unit has been frozen
            losses[OUTPUT] = self._loss(z, y).detach()
        return StepReport(losses[OUTPUT], self._task.accuracy(z, y), losses)

    @property
    def _task(self) -> Task:
        assert self.task is not None, "every batch is checked before it is learned from"
        return self.task

    def _taught(self, z: Tensor, y: Tensor) -> Tensor:
        """The task loss of the network's output ``z``, which teaches the last unit."""
        loss = self._loss(z, y)
        if OUTPUT not in self._known:
            of_model = {*leaves_of([z]), *self.model.parameters()}
            own = [p for p in leaves_of([loss]) if p not in of_model]
            self._loss_parameters = check_trained(own, self.optimizer)
            self._known.add(OUTPUT)
        return loss

    def _loss(self, z: Tensor, y: Tensor) -> Tensor:
        try:
            loss = self.loss(z, y)
        except Exception as error:
            if type(error) not in (RuntimeError, ValueError, TypeError, IndexError):
                raise  # out of memory, or an error of the loss's own
            raise ValueError(
                f"loss cannot take an output of shape {tuple(z.shape)} with y of shape "
                f"{tuple(y.shape)}, {y.dtype}: {error}" + f"; {FOR_TOKENS}" * (z.ndim == 3)
            ) from error
        if not z.requires_grad:
            return loss
        return check_scalar("loss must be 0-dim and depend on the output", loss)

    def _rule_loss(self, unit: Unit, i: int, h: Tensor, supervision: Supervision) -> Tensor:
        """The rule's loss on the ``i``-th features ``h`` of ``unit``."""
        spec, feedback = self.unit_spec(unit, i), self.feedback_of(unit, i)
        must = f"the loss of rule {self.rule.name!r} must be 0-dim and depend on h"
        found = self.rule.loss(spec, feedback, unit.features[i].layout(h), supervision)
        loss = check_scalar(must, found)
        if unit.name not in self._known and not depends(loss, h):
            raise ValueError(f"{must}, got one that does not")
        self._known.add(unit.name)
        return loss

    def _recomputing(self) -> AbstractContextManager[None]:
        if not self.recompute:
            return contextlib.nullcontext()
        return recomputing(self.model, self.plan.blocks)

    def _output_error(self, x: Any, y: Tensor) -> Tensor:
        """``dL/dz``, from a first pass that leaves no trace."""
        with preserved(self.model), torch.no_grad():
            z = forward(self.model, x)
        # In the weights' precision: float16 would round entries of the size of 1 / batch away.
        z = z.detach().to(self._dtype).requires_grad_()
        return torch.autograd.grad(self._loss(z, y), z)[0]

    def _finish(self, unit: Unit, scale: Scale) -> None:
        """Add the gradients of the unit's weight terms."""
        view = self.unit_spec(unit)
        if not view.layers:
            return
        with outside_autocast():
            loss = self.rule.weights_loss(view, self.feedback_of(unit))
        if loss is not None and loss.requires_grad:
            factors = [
                p for layer in view.layers for p in (layer.U, layer.s, layer.V) if p.requires_grad
            ]
            grads = torch.autograd.grad(scale(loss), factors, allow_unused=True)
            for parameter, grad in zip(factors, grads, strict=True):
                _accumulate(parameter, grad)

    def _stiefel_factors(self) -> Iterable[nn.Parameter]:
        for module in self._on_the_manifold:
            for X in (module.U, module.V):
                if isinstance(X, nn.Parameter) and X.requires_grad:
                    yield X

    def _check(self, x: Any, y: Tensor) -> None:
        """Refuse a batch that cannot be learned from. On devices other than the CPU reading values
        costs a host sync: there it is done for the first batch only."""
        if torch.is_inference_mode_enabled():
            raise ValueError("learning needs gradients, which torch.inference_mode does not record")
        check_input("x", x)
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor of targets, got {type(y).__name__}")
        inputs = [value for value in _parts(x) if isinstance(value, Tensor)]
        if y.numel() == 0 or (inputs and all(value.numel() == 0 for value in inputs)):
            raise ValueError("the batch is empty: x and y must hold at least one sample")
        shape, first = self.plan.output_shape, self.task is None
        task = find_task(self.loss, shape, y, self._kind) if self.task is None else self.task
        if task.kind in ("classes", "binary", "labels") and isinstance(x, Tensor):
            sizes = [x.shape[axis] for axis in self.plan.batch_axes]
            if sizes and (y.ndim == 0 or len(y) not in sizes):
                raise ValueError(
                    f"y must hold a target for each of the {sizes[0]} samples of x, got shape "
                    f"{tuple(y.shape)}"
                )
        if first or y.device.type == "cpu":
            task.check(y, self.loss)
        if first:
            for value in inputs:
                if value.is_floating_point() and not values_of(value).isfinite().all():
                    raise ValueError(
                        "x must be finite, got NaN or infinite values in the first batch"
                    )
        self.task = task


def _parts(x: Any) -> Iterable[Any]:
    """What an input is made of: arguments by position or by name, or itself."""
    return x if isinstance(x, tuple | list) else x.values() if isinstance(x, dict) else (x,)


def _key(unit: int, feature: int) -> str:
    """The key of a feedback: that of a unit's only feature is the unit's number."""
    return f"{unit}_{feature}" if feature else str(unit)


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _accumulate(parameter: nn.Parameter, grad: Tensor | None) -> None:
    if grad is not None:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def _layers(model: nn.Module, unit: Unit) -> Iterable[FactoredLayer]:
    """The factored layers whose weights the unit owns."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in unit.parameters)
    for owner in owners:
        module = model.get_submodule(owner)
        if isinstance(module, FactoredLayer):
            yield module
