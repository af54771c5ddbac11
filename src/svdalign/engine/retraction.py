"""Orthonormal factors, brought back onto the Stiefel manifold after an optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._autocast import outside_autocast
from ..factors._cut import is_schedule_free
from ..factors.stiefel import RETRACTIONS


def orthonormal(*parts: nn.Module) -> list[nn.Module]:
    """The modules in ``parts`` that have orthonormal factors ``U`` and ``V``, as they say by an
    attribute ``orthonormal``."""
    modules = (module for part in parts for module in part.modules())
    return [module for module in modules if getattr(module, "orthonormal", False)]


#: Values of factors of one shape that are retracted together: the calls are shared, and the
#: scratch space stays small beside the weights of a network whose factors are large.
_TOGETHER = 1 << 18


def retract(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, how: str) -> None:
    """Retract the trainable factors ``U`` and ``V`` of ``modules``, ``how`` being a name in
    :data:`svdalign.factors.stiefel.RETRACTIONS`.

    A schedule-free optimizer keeps two copies of each weight, and both are retracted; see below.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    schedule_free = is_schedule_free(optimizer)
    retraction, factors = RETRACTIONS[how], list[nn.Parameter]()
    with torch.no_grad(), outside_autocast():
        for X in (X for module in modules for X in (module.U, module.V)):
            if not (isinstance(X, nn.Parameter) and X.requires_grad):
                continue
            if schedule_free and "z" in (state := optimizer.state.get(X, {})):
                _retract_copies(X, state, groups[X], retraction)
            else:
                factors.append(X)
        for alike in _alike(factors):
            found = retraction(torch.stack([*alike])) if len(alike) > 1 else [retraction(alike[0])]
            for X, retracted in zip(alike, found, strict=True):
                X.copy_(retracted)


def _retract_copies(
    y: Tensor, state: dict[str, Any], group: dict[str, Any], retraction: Callable[[Tensor], Tensor]
) -> None:
    """Retract the two matrices that a schedule-free optimizer keeps of a weight: ``z``, which takes
    the steps, and ``x``, the running mean of ``z``, which is evaluated. The weight itself is ``x``
    in evaluation and ``y = beta x + (1 - beta) z`` in training. So ``y`` is as close to the
    manifold as ``x`` and ``z`` are to each other. To retract ``y`` itself would drive these two
    apart, further with every step.

    Source: Defazio et al., *The Road Less Scheduled* (2024).
    """
    z, training = state["z"], group.get("train_mode", False)
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    x = state["x"] if "x" in state else y.lerp(z.to(y.dtype), 1 - 1 / beta) if training else y
    x.copy_(retraction(x))
    z.copy_(retraction(z))
    y.copy_(x.lerp(z.to(x.dtype), 1 - beta) if training else x)


def _alike(factors: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """``factors`` in groups of one shape, dtype and device and at most ``_TOGETHER`` values."""
    groups: dict[Hashable, list[nn.Parameter]] = defaultdict(list)
    for X in factors:
        groups[X.shape, X.dtype, X.device].append(X)
    for alike in groups.values():
        size = max(1, _TOGETHER // max(1, alike[0].numel()))
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
