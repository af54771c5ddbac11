"""Orthonormal factors, brought back onto the Stiefel manifold after an optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .._autocast import outside_autocast
from ..factors.stiefel import RETRACTIONS

__all__ = ["orthonormal", "retract"]


def orthonormal(*parts: nn.Module) -> list[nn.Module]:
    """The modules in ``parts`` that have orthonormal factors ``U`` and ``V``, as they say by an
    attribute ``orthonormal``."""
    modules = (module for part in parts for module in part.modules())
    return [module for module in modules if getattr(module, "orthonormal", False)]


#: Values of factors of one shape that are retracted together: the calls are shared, and the
#: scratch space stays small beside the weights of a network whose factors are large.
TOGETHER = 1 << 18


def retract(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, how: str) -> None:
    """Retract the trainable factors ``U`` and ``V`` of ``modules``, ``how`` being a name in
    :data:`svdalign.factors.stiefel.RETRACTIONS`.

    A schedule-free optimizer holds a second copy ``z`` of each weight and evaluates with a mean of
    the two, so ``z`` is moved along.
    """
    schedule_free = all("train_mode" in group for group in optimizer.param_groups)
    factors = [
        X
        for module in modules
        for X in (module.U, module.V)
        if isinstance(X, nn.Parameter) and X.requires_grad
    ]
    with torch.no_grad(), outside_autocast():
        for alike in _alike(factors):
            retraction = RETRACTIONS[how]
            found = retraction(torch.stack([*alike])) if len(alike) > 1 else [retraction(alike[0])]
            for X, retracted in zip(alike, found, strict=True):
                z = optimizer.state.get(X, {}).get("z")
                if schedule_free and isinstance(z, Tensor) and z.shape == X.shape:
                    z += (retracted - X).to(z.dtype)
                X.copy_(retracted)


def _alike(factors: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """``factors`` in groups of one shape, dtype and device and at most ``TOGETHER`` values."""
    groups: dict[Hashable, list[nn.Parameter]] = defaultdict(list)
    for X in factors:
        groups[X.shape, X.dtype, X.device].append(X)
    for alike in groups.values():
        size = max(1, TOGETHER // alike[0].numel())
        yield from (alike[i : i + size] for i in range(0, len(alike), size))
