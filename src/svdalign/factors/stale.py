"""Refuse the next step of an optimizer whose state has ranks that the model no longer has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_svdalign_shapes_before"  #: attribute of parameters whose shape has changed

_watching: list[object] = []  #: the hook's handle, once there is something to watch for


def note_new_rank(parameter: nn.Parameter) -> None:
    """``parameter`` is about to change its shape: check every optimizer that it belongs to before
    its steps, from now on."""
    setattr(parameter, _MARK, getattr(parameter, _MARK, set()) | {parameter.shape})
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_refuse_stale_state))


def _refuse_stale_state(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        before: set[torch.Size] = getattr(p, _MARK, set()) - {p.shape}
        if not before:
            continue
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape in before:
                _refuse(p, f"has state of shape {tuple(value.shape)}")
        # Its state is flat vectors over all parameters, whose length it remembers.
        known = getattr(optimizer, "_numel_cache", None)
        if known is not None and known != sum(q.numel() for q in parameters):
            _refuse(p, f"is one of parameters that were {known:,} numbers together")


def _refuse(p: Tensor, state: str) -> None:
    raise RuntimeError(
        f"model's ranks were cut and the optimizer's state was not: a factor of shape "
        f"{tuple(p.shape)} {state}; cut both by reduce_rank(model, optimizer, ...), or clear "
        "optimizer.state"
    )
