"""What a learner refuses, with the cause and the way to do it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..factors.stiefel import RETRACTIONS
from ..task import KINDS, Kind, Loss, Output, Task, find_task
from .forward import values_of
from .units import Plan

_PARALLEL = {
    "DistributedDataParallel": "averages the gradients of one backward pass through all of it",
    "FullyShardedDataParallel": "gathers weights for one backward pass through all of it",
    "DataParallel": "runs copies of it, in which no unit can end",
}


def check_model(model: nn.Module, *, units: bool) -> None:
    """Refuse a model that cannot be trained; ``units``: that cannot be trained unit by unit."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if torch.is_inference_mode_enabled():
        raise ValueError("a learner needs gradients, which torch.inference_mode does not record")
    name = type(model).__name__
    if name in _PARALLEL:
        raise ValueError(
            f"model is a {name}, which {_PARALLEL[name]}; give the module inside it, model.module. "
            "For several processes there is svdalign.parallel.DataParallel(learner)"
        )
    if units and name == "OptimizedModule":
        raise ValueError(
            "model was compiled as a whole, so that no unit can end inside it; give the module "
            "before torch.compile, and compile its blocks in place, block.compile()"
        )
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if units and "FSDPModule" in kinds:
        raise ValueError(
            "model was given to fully_shard, which gathers weights for one backward pass through "
            "all of it; give the model before that. For several processes there are "
            "svdalign.parallel.LayerParallel(learner), where each has the weights of its own units "
            "alone, and svdalign.parallel.DataParallel(learner)"
        )
    if units and isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model was compiled as a whole by torch.jit, so that no unit can end inside it; give "
            "the module before torch.jit.script or torch.jit.trace"
        )
    parameters = dict(model.named_parameters())
    for path, p in parameters.items():
        kind = (
            "lazy: run the model on a batch first"
            if is_lazy(p)
            else "on the meta device"
            if p.is_meta and torch.get_default_device().type != "meta"  # where all is, on purpose
            else "made in inference mode"
            if p.is_inference()
            else None
        )
        if kind is not None:
            raise ValueError(f"model must have weights that can be trained, but {path!r} is {kind}")
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError("model has no parameter to train (none requires a gradient)")


def check_settings(
    retraction: object,
    retract_every: object,
    optimizer: object,
    loss: object,
    task: object,
    seed: object,
) -> None:
    """Refuse settings of a learner that are not allowed."""
    if retraction is not None and retraction not in RETRACTIONS:
        raise ValueError(
            f"retraction must be one of {sorted(RETRACTIONS)} or None, got {retraction!r}"
        )
    if type(retract_every) is not int or retract_every < 1:
        raise ValueError(
            f"retract_every must be a whole number of at least 1, got {retract_every!r}"
        )
    if type(seed) is not int:
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be called with the parameters to train, among them those of the "
            "feedback, such as lambda p: torch.optim.AdamW(p, 1e-3), "
            f"got {type(optimizer).__name__}"
        )
    if task is not None and task not in KINDS:
        raise ValueError(f"task must be one of {KINDS} or None, got {task!r}")
    if isinstance(loss, type):
        raise TypeError(f"loss must be called with (z, y), got a class: give {loss.__name__}()")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be called with (z, y), got {type(loss).__name__}")


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``optimizer`` evaluates the loss by itself, as LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_parameters(model: nn.Module, known: Mapping[str, Tensor]) -> None:
    """Refuse a model with other parameters than ``known``, which its learner was made with."""
    now = dict(model.named_parameters())
    if {id(p) for p in now.values()} != {id(p) for p in known.values()}:
        names = sorted(n for n in now.keys() | known.keys() if now.get(n) is not known.get(n))
        raise RuntimeError(
            f"model's parameters {', '.join(names)} were replaced after its learner was made: its "
            "optimizer does not train the new ones. Make a new learner; load weights without "
            "assign=True"
        )


def check_early_updates(plan: Plan, horizon: int | None, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to update each unit as it retires where that is another update."""
    if horizon is None:
        raise ValueError("update_early needs units: horizon must be a whole number, got None")
    if needs_closure(optimizer):
        raise ValueError(
            "update_early needs an optimizer that steps on given gradients, "
            f"{type(optimizer).__name__} evaluates the loss by itself"
        )
    units = Counter(name for unit in plan.units for name in unit.parameters)
    if shared := sorted(name for name, count in units.items() if count > 1):
        raise ValueError(
            f"update_early needs weights that belong to one unit each, {', '.join(shared)} belong "
            "to several"
        )


def refuse_again(path: str, module: nn.Module, args: Any) -> None:
    """A hook for the module ``path``, which ends a unit that has been updated in this step."""
    raise ValueError(
        f"update_early has updated the unit that ends at {path!r}, which runs again for the "
        "gradient of a later one, as in a checkpointed block: end units at such blocks, not inside"
    )


def check_batch(
    x: Any,
    y: Any,
    plan: Plan,
    loss: Loss,
    kind: Kind | None,
    task: Task | None,
    dtype: torch.dtype,
) -> Task:
    """Refuse a batch that cannot be learned from; returns its task, which is ``task`` unless that
    is None, as for the first batch. ``dtype``: that of the weights. On devices other than the CPU
    reading values costs a host sync: there it is done for the first batch only."""
    if torch.is_inference_mode_enabled():
        raise ValueError("learning needs gradients, which torch.inference_mode does not record")
    check_input("x", x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of targets, got {type(y).__name__}")
    if y.is_inference():
        raise ValueError("y was made in inference mode; outside it, y.clone() will do")
    inputs = [value for value in _arguments(x) if isinstance(value, Tensor)]
    if y.numel() == 0 or (inputs and all(value.numel() == 0 for value in inputs)):
        raise ValueError("the batch is empty: x and y must hold at least one sample")
    first = task is None
    if task is None:
        task = find_task(loss, Output(plan.output_shape, plan.output_axis), y, kind)
    if task.kind in ("classes", "binary", "labels") and isinstance(x, Tensor):
        sizes = [x.shape[axis] for axis in plan.batch_axes]
        if sizes and (y.ndim == 0 or len(y) not in sizes):
            raise ValueError(
                f"y must hold a target for each of the {sizes[0]} samples of x, got shape "
                f"{tuple(y.shape)}; where the batch is no axis of y, give the learner task='other'"
            )
    if first:
        task.check_dtype(y, loss, dtype)
    if first or y.device.type == "cpu":
        task.check(y, loss)
    for value in inputs if first else ():
        if value.is_floating_point() and not values_of(value).isfinite().all():
            raise ValueError("x must be finite, got NaN or infinite values in the first batch")
    return task


def _arguments(x: Any) -> Iterable[Any]:
    """The arguments in an input: those of a tuple or dict, or the input itself."""
    return x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else (x,)


def check_input(name: str, x: Any) -> None:
    """Refuse inputs that are no batch, arrays of numpy, and tensors that cannot be learned from."""
    if x is None or (isinstance(x, Tensor) and x.ndim == 0 and not x.is_nested):
        found = "None" if x is None else "a tensor of one number"
        raise ValueError(f"{name} must be a batch of inputs, got {found}")
    leaves = [leaf for value in _arguments(x) for leaf in tree_leaves(value)]
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves):
        raise ValueError(
            f"{name} must hold samples of one shape, got a nested tensor: pad it, and give the "
            "model a mask"
        )
    if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        raise ValueError(f"{name} was made in inference mode; outside it, {name}.clone() will do")
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        raise TypeError(
            f"{name} must be a tensor, or a tuple or dict of arguments of the model, got a "
            "numpy.ndarray: torch.from_numpy makes a tensor of it"
        )


def check_scalar(what: str, loss: Any, *, gradient: bool = True) -> Tensor:
    """``loss``, 0-dim, if it is a number that has a gradient (or needs none)."""
    if not isinstance(loss, Tensor):
        found = "None" if loss is None else type(loss).__name__
    elif loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}"
    elif gradient and not loss.requires_grad:
        found = "one that is detached"
    else:
        return loss.reshape(())
    raise ValueError(f"{what}, got {found}")


def check_trained(
    parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Tensor, ...]:
    """``parameters`` of the loss, if ``optimizer`` trains them all."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    found = tuple(parameters)
    if missing := [tuple(p.shape) for p in found if p not in trained]:
        raise ValueError(
            f"loss has weights of its own, of shapes {missing}, which the optimizer does not "
            "train: optimizer=lambda p: torch.optim.AdamW([*p, *loss.parameters()], 1e-3), or "
            "loss.requires_grad_(False) to keep them"
        )
    return found
