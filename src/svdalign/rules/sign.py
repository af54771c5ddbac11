"""Sign-symmetric feedback: errors travel layer by layer, through the signs of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..factors.registry import dense_copy
from ._registry import register
from .fa import FA, mirrored


@register
@dataclass(frozen=True)
class SignSymmetric(FA):
    """Backpropagation whose errors go back through ``sign(W)`` times the mean of ``|W|``, with
    ``W`` the layer's present weight. The whole graph is kept, as for BP.

    Source: Liao, Leibo and Poggio, *How Important Is Weight Symmetry in Backpropagation?* (2016),
    there called uniform sign-concordant feedback, uSF; Moskovitz, Litwin-Kumar and Abbott (2018).
    """

    name: str = "sign-symmetric"

    def magnitudes(self, weight: Tensor) -> Tensor:
        """What the signs of ``weight`` are multiplied by, of its shape or 0-dim."""
        return weight.abs().mean()

    def mirror(self, layer: nn.Module, generator: torch.Generator) -> nn.Module:
        return dense_copy(layer)

    @contextlib.contextmanager
    def transporting(self, model: nn.Module, transport: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            for layer, mirror in mirrored(model, transport):
                weight = cast(Tensor, layer.weight)
                mirror.get_parameter("weight").copy_(weight.sign() * self.magnitudes(weight))
        with super().transporting(model, transport):
            yield


@register
@dataclass(frozen=True)
class BatchwiseRandomSign(SignSymmetric):
    """:class:`SignSymmetric` with random magnitudes, drawn for every batch uniformly from 0 to
    twice the mean of ``|W|``.

    Source: Liao, Leibo and Poggio (2016), batchwise random magnitude sign-concordant feedback.
    """

    name: str = "brsf"

    def magnitudes(self, weight: Tensor) -> Tensor:
        return 2.0 * weight.abs().mean() * torch.rand_like(weight)
