"""Orthonormal factors, brought back onto the Stiefel manifold after an optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable

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


def retract(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, how: str) -> None:
    """Retract the trainable factors ``U`` and ``V`` of ``modules``, ``how`` being a name in
    :data:`svdalign.factors.stiefel.RETRACTIONS`.

    A schedule-free optimizer holds a second copy ``z`` of each weight and evaluates with a mean of
    the two, so ``z`` is moved along.
    """
    schedule_free = all("train_mode" in group for group in optimizer.param_groups)
    with torch.no_grad(), outside_autocast():
        for module in modules:
            for X in (module.U, module.V):
                if not (isinstance(X, nn.Parameter) and X.requires_grad):
                    continue
                retracted = RETRACTIONS[how](X)
                z = optimizer.state.get(X, {}).get("z")
                if schedule_free and isinstance(z, Tensor) and z.shape == X.shape:
                    z += (retracted - X).to(z.dtype)
                X.copy_(retracted)
