"""Orthonormal factors, brought back onto the Stiefel manifold after an optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

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

    A schedule-free optimizer keeps two copies of each weight, and both are retracted; see below.
    """
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any
