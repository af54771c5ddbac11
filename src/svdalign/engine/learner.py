"""The learner: a model, a rule and an optimizer, with a method that learns from a batch."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import rules
from .._autocast import outside_autocast
from .._table import as_html, as_text
from .._tracing import temporary, untraced
from ..rules import Rule, Supervision, UnitSpec
from ..task import Kind, Loss, Task, find_class_axis
from .checks import (
    check_batch,
    check_early_updates,
    check_input,
    check_model,
    check_parameters,
    check_settings,
    needs_closure,
    refuse_again,
)
from .cuts import Units
from .forward import forward, preserved
from .local_losses import LocalLosses
from .ownership import reached
from .plan import make_plan
from .recompute import recomputing
from .retraction import orthonormal, retract
from .shown import unit_rows
from .streaming import stream
from .task_loss import TaskLoss
from .units import OUTPUT, Plan, Unit

_Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepReport:
    """The losses of one step, as tensors on the model's device; only reading a value waits for it.

    ``loss``: task loss of the network's output. ``accuracy``: share of right answers, targets that
    the loss ignores left out; None for tasks without right and wrong answers. ``unit_losses``: each
    unit's own loss by its name; that of the last unit, ``"output"``, is ``loss``.
    """

    loss: Tensor
    accuracy: Tensor | None
    unit_losses: dict[str, Tensor]


def _nothing(unit: Unit, parameters: list[Tensor]) -> None:
    """What is done when a unit has its gradients, unless something else is asked for."""


class _Default:
    def __repr__(self) -> str:
        return "the rule's own"


_DEFAULT: Any = _Default()


class Learner:
    """Trains ``model`` by ``rule``, unit by unit.

    Args:
        model: any ``nn.Module``, factored or dense. It is trained in place; its ``forward`` runs
            unchanged.
        rule: a name (:func:`svdalign.rules.available`) or a :class:`Rule`.
        units: where units end: "layer", "block", "stage", "balanced", "balanced-3", ..., a number
            of blocks, a list of module names, or a callable, see :func:`make_plan`.
        horizon: how many units upstream a unit's gradient still travels: a whole number from 0, or
            None for backpropagation. By default the rule's own.
        error: where the error that teaches a unit comes from: "output" (the network's output),
            "local" (the unit's own readout) or "target" (the targets alone). By default the rule's
            own.
        optimizer: called with the list of parameters to train, those of learned feedback included;
            returns the optimizer.
        example: a batch of inputs: a tensor, or a tuple or dict of arguments of ``model``. The
            first axis of a tensor is the batch, in most models.
        loss: ``(z, y) -> 0-dim tensor``, a mean over the batch; cross-entropy by default.
        task: what the targets are: "classes", "binary", "labels", "numbers" or "other", see
            :class:`svdalign.task.Task`. By default it is found from the first batch, by calls of
            ``loss`` on small outputs.
        retraction: how the columns of ``U`` and ``V`` are made orthonormal again: "qr", "polar",
            "newton-schulz" (for small steps), or None for not at all.
        retract_every: after how many steps, a whole number from 1, each time.
        recompute: residual or transformer blocks (layers where there are none) save only their
            inputs and run again in the backward pass, ``horizon + 1`` times.
        update_early: :meth:`step` updates a unit's weights and drops their gradients as soon as the
            unit has gone backward, so that gradients of one unit exist at a time. The optimizer's
            ``step`` is called once for each unit. The update is the same if the optimizer treats
            every parameter by itself, as SGD and Adam do; one that looks at all gradients at once,
            for example to clip their joint norm, sees those of one unit. If a loss fails, the units
            before it stay updated; so do they where a checkpointed block holds several units,
            which is refused when it runs again.
        seed: of the feedback's random matrices.

    Raises:
        TypeError: for an argument of a wrong type; the message names it.
        ValueError: for an argument that does not fit; the message names it.
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
        update_early: bool = False,
        seed: int = 0,
    ) -> None:
        check_settings(retraction, retract_every, optimizer, loss, task, seed)
        changes: dict[str, Any] = {"horizon": horizon, "error": error}
        self.rule = replace(
            rules.get(rule), **{k: v for k, v in changes.items() if v is not _DEFAULT}
        )
        check_model(model, units=self.horizon is not None)
        check_input("example", example)
        self.model = model
        self.loss: Loss = F.cross_entropy if loss is None else loss
        self.task: Task | None = None  # found from the first batch
        self._kind: Kind | None = "classes" if loss is None and task is None else task
        self.retraction, self.retract_every = retraction, retract_every
        self.steps = 0
        # Training on several processes (svdalign.parallel) replaces these two.
        self._one_pass: Callable[..., Tensor | None] = stream
        self._retired: Callable[[Unit, list[Tensor]], None] = _nothing
        plan = make_plan(model, units, example, whole=self.horizon is None)
        if self._kind in ("classes", None):
            axis = find_class_axis(self.loss, plan.output_shape, plan.output_axis)
            plan = replace(plan, output_axis=axis)
        self.plan: Plan = plan
        self.recompute = recompute
        if self.plan.unreached and self.horizon is not None:
            warnings.warn(
                "these parameters do not reach the network's output for the example, and learn "
                f"only from batches for which they do: {self.plan.unreached}",
                stacklevel=2,
            )
        generator = torch.Generator().manual_seed(seed)
        self._local = LocalLosses(self.rule, model, self.plan, generator)
        self.feedback = self._local.feedback
        self.transport = self.rule.transport(model, generator)
        self._on_the_manifold = orthonormal(model, self.feedback)
        self._parameters = dict(model.named_parameters())
        parameters = [p for p in self._parameters.values() if p.requires_grad]
        self.optimizer = optimizer([*parameters, *self.feedback.parameters()])
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be called with parameters and return a torch.optim.Optimizer, "
                f"got {self.optimizer!r}"
            )
        self._task_loss = TaskLoss(self.loss, model, self.optimizer)
        self.update_early = update_early
        if update_early:
            check_early_updates(self.plan, self.horizon, self.optimizer)

    def __repr__(self) -> str:
        return f"{self._heading()}\n{as_text(unit_rows(self))}"

    def _repr_html_(self) -> str:
        return as_html(unit_rows(self), self._heading())

    def _heading(self) -> str:
        task = "found from the first batch" if self.task is None else str(self.task)
        return (
            f"Learner of {type(self.model).__name__}\n"
            f"rule: {self.rule}\n"
            f"task: {task if self._kind is None or self.task else self._kind}\n"
            f"{type(self.optimizer).__name__}, {self.steps} steps"
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
        """The module that brings errors to ``unit``, None where the rule has none. ``feature``: the
        number of the feature, for a unit with several."""
        return self._local.feedback_of(unit, feature)

    def unit_spec(self, unit: Unit, feature: int = 0) -> UnitSpec:
        """``unit`` as the rule sees it."""
        return self._local.spec(unit, feature)

    def step(self, x: Any, y: Tensor) -> StepReport:
        """Learn from one batch: gradients, optimizer step, retraction. Does not wait for the
        device.

        ``x``: inputs laid out as ``example``, (B, ...) for most models; B may differ, and lengths
        and sizes of maps where the model and the rule's ``grid`` let them. ``y``: what ``loss``
        takes beside the output; for the default cross-entropy class indices (B,), (B, H, W) for
        an output (B, C, H, W), or probabilities of the output's shape.

        Raises TypeError for a ``y`` that is no tensor and ValueError for a batch that cannot be
        learned from, before anything changes: an empty one, ``x`` not finite or ``y`` out of range
        (of the first batch), ``y`` of a wrong dtype or length; RuntimeError for a module that is
        called more often than for the example, and for a model whose parameters were replaced after
        the learner was made.
        """
        if self.update_early:
            return self._step_early(x, y)
        reports: list[StepReport] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            reports.append(self.backward(x, y))
            return reports[-1].loss

        if needs_closure(self.optimizer):
            self.optimizer.step(closure)  # type: ignore[arg-type]
            self.after_update()
        else:
            closure()
            self.update()
        return reports[0]

    def _step_early(self, x: Any, y: Tensor) -> StepReport:
        retired = self._retired

        updated: list[RemovableHandle] = []

        def update(unit: Unit, parameters: list[Tensor]) -> None:
            retired(unit, parameters)
            self.optimizer.step()  # of what has a gradient
            self.optimizer.zero_grad(set_to_none=True)
            if unit.exit:
                end = self.model.get_submodule(unit.exit)
                refuse = untraced(partial(refuse_again, unit.exit))
                updated.append(end.register_forward_pre_hook(refuse))

        self.optimizer.zero_grad(set_to_none=True)
        self._retired = update
        try:
            with temporary(updated):
                report = self.backward(x, y)
        finally:
            self._retired = retired
        self.after_update()
        return report

    def update(self) -> None:
        """The second half of :meth:`step`: the optimizer's step with the present gradients, then
        the retraction. Clip gradients after :meth:`backward` and before this.

        Raises TypeError for an optimizer that evaluates the loss by itself, such as LBFGS."""
        if needs_closure(self.optimizer):
            raise TypeError(
                f"{type(self.optimizer).__name__} evaluates the loss by itself: call "
                "learner.step(x, y), or learner.optimizer.step(closure) with a closure that calls "
                "learner.optimizer.zero_grad() and returns learner.backward(x, y).loss, then "
                "learner.after_update()"
            )
        self.optimizer.step()
        self.after_update()

    def after_update(self) -> None:
        """Retract the factors every ``retract_every`` steps. For loops that call ``optimizer.step``
        themselves."""
        self.steps += 1
        torch.clear_autocast_cache()  # of copies of the weights before the update
        if self.steps % self.retract_every == 0:
            self.retract()

    def retract(self) -> None:
        """Make the columns of the factors orthonormal again, for loops that change factors between
        steps. Without a ``retraction`` it does nothing."""
        if self.retraction is not None:
            retract(self._on_the_manifold, self.optimizer, self.retraction)

    @torch.enable_grad()
    def backward(self, x: Any, y: Tensor, *, scale: _Scale | None = None) -> StepReport:
        """Add this batch's gradients to the parameters' ``.grad``, without an update. ``x``, ``y``
        and errors are those of :meth:`step`.

        ``scale``: applied to every loss before its gradient is taken, such as
        ``lambda loss: loss / 4`` to accumulate four batches, or ``GradScaler.scale``; what is
        reported is not scaled.
        """
        check_parameters(self.model, self._parameters)
        self.task = check_batch(
            x, y, self.plan, self.loss, self._kind, self.task, self._local.dtype
        )
        scale = (lambda loss: loss) if scale is None else scale
        if self.horizon is None:
            return self._backpropagate(x, y, scale)
        return self._stream(x, y, scale)

    def gradients(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """The rule's gradients for a batch, by the parameters' names; the call changes nothing.
        ``x``, ``y`` and errors are those of :meth:`step`."""
        named = dict(self.model.named_parameters())
        everything: list[Tensor] = [*named.values(), *self.feedback.parameters()]
        everything += self._task_loss.parameters
        saved = {p: p.grad for p in everything}
        for p in everything:
            p.grad = None
        try:
            with preserved(self.model):
                self.backward(x, y)
            return {name: p.grad for name, p in named.items() if p.grad is not None}
        finally:
            for p in (*everything, *self._task_loss.parameters):
                p.grad = saved.get(p)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: model, feedback, transport, optimizer, the number of steps
        and the kind of task."""
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
        """Load what :meth:`state_dict` returned; factored layers take the ranks that were saved.

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
        """ValueError if ``state``, of :meth:`state_dict`, is that of a learner with other units, as
        the feedback would not fit."""
        units = [unit.name for unit in self.units]
        if (saved := state.get("units", units)) != units:
            raise ValueError(f"state is of a learner with units {saved}, this one has {units}")

    # --- one batch ------------------------------------------------------------------------------

    def _backpropagate(self, x: Any, y: Tensor, scale: _Scale) -> StepReport:
        carried = (
            contextlib.nullcontext()
            if self.transport is None
            else self.rule.transporting(self.model, self.transport)
        )
        with carried, self._recomputing():
            z = forward(self.model, x)
            loss = self._task_loss.teach(z, y)
            with outside_autocast():
                scale(loss).backward()  # type: ignore[no-untyped-call]
        for unit in self.plan.units:
            self._local.add_weight_gradients(unit, scale)
        loss = loss.detach()
        return StepReport(loss, self._task.accuracy(z.detach(), y), {OUTPUT: loss})

    def _stream(self, x: Any, y: Tensor, scale: _Scale) -> StepReport:
        assert self.horizon is not None
        error = self._output_error(x, y) if self._local.need_output_error else None
        supervision = Supervision(y, self._task_loss, error, self._task)
        losses: dict[str, Tensor] = {}

        def unit_loss(unit: Unit, features: dict[int, Tensor]) -> Tensor:
            if unit is self.plan.output:
                loss = self._task_loss.teach(features[0], y)
            else:
                loss = self._local.loss(unit, features, supervision)
            losses[unit.name] = loss.detach()
            return scale(loss)

        def unit_backward(unit: Unit, heads: list[Tensor], planned: bool) -> None:
            if planned and not self.plan.unreached:
                parameters: list[Tensor] = [self._parameters[n] for n in unit.parameters]
            else:
                parameters = [*reached(heads, list(self.model.parameters()))]
            parameters += self._local.feedback_parameters(unit)
            if unit is self.plan.output:
                parameters += self._task_loss.parameters
            parameters = [p for p in parameters if p.requires_grad]
            if parameters:
                torch.autograd.backward(heads, inputs=parameters)
            self._local.add_weight_gradients(unit, scale)
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
            losses[OUTPUT] = self._task_loss(z, y).detach()
        return StepReport(losses[OUTPUT], self._task.accuracy(z, y), losses)

    @property
    def _task(self) -> Task:
        assert self.task is not None, "every batch is checked before it is learned from"
        return self.task

    def _recomputing(self) -> AbstractContextManager[None]:
        if not self.recompute:
            return contextlib.nullcontext()
        return recomputing(self.model, self.plan.blocks)

    def _output_error(self, x: Any, y: Tensor) -> Tensor:
        """``dL/dz``, from a first pass that changes no buffers and no random state."""
        with preserved(self.model), torch.no_grad():
            z = forward(self.model, x)
        # In the weights' precision: in float16, entries of the size of 1 / batch could become 0.
        z = z.detach().to(self._local.dtype).requires_grad_()
        return torch.autograd.grad(self._task_loss(z, y), z)[0]
