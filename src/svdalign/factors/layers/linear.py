"""Factored ``nn.Linear``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import FactoredLayer, Scheme, plain_layer


class SVDLinear(FactoredLayer, dense=nn.Linear):
    """``nn.Linear`` with ``weight = U diag(s) V^T``: ``U`` (out, r), ``V`` (in, r).

    Input ``(..., in)``, output ``(..., out)``. Both schemes are the same.
    """

    channels_last = True

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    @staticmethod
    def to_matrix(weight: Tensor, scheme: Scheme) -> Tensor:
        return weight

    def from_matrix(self, W: Tensor) -> Tensor:
        return W

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.V, self.U * self.s, self.bias)

    def dense(self) -> nn.Module:
        return linear(self.matrix(), self.bias)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        return linear(self.V.mT, None), linear(self.U * self.s, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The ``nn.Linear`` of ``weight`` (out, in) and ``bias``."""
    out, fan_in = weight.shape
    return plain_layer(weight, bias, nn.Linear, fan_in, out, bias is not None)
