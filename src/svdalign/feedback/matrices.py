"""Feedback matrices ``B`` (d, C): from the network's output space to a unit's pooled features."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..factors.stiefel import qr_retract


class Feedback(nn.Module):
    """A (d, C) matrix ``B``, used in both directions: ``B e`` brings an error ``e`` back to a unit,
    ``B^T p`` reads logits from the unit's pooled features ``p``.

    The gradient of ``<readout(p), e>`` in ``p`` is ``B e``, so that :meth:`readout` is enough to
    teach a unit. A readout that is not linear needs no ``project`` and ``directions``, which would
    depend on ``p``.

    ``fineness``: along each axis, it reads this many times as many cells as the rule's grid has.
    """

    fineness: ClassVar[int] = 1

    def readout(self, p: Tensor) -> Tensor:
        """``B^T p`` for rows ``p`` (..., d): (..., C)."""
        raise NotImplementedError

    def project(self, e: Tensor) -> Tensor:
        """``B e`` for rows ``e`` (..., C): (..., d)."""
        raise NotImplementedError

    def directions(self) -> Tensor:
        """A (d, k) matrix whose columns span all vectors ``B e``."""
        raise NotImplementedError


class GaussianFeedback(Feedback):
    """The fixed dense Gaussian ``B`` of direct feedback alignment, with entries of variance
    ``1 / C``.

    Source: Noekland, *Direct Feedback Alignment Provides Learning in Deep Neural Networks* (2016).
    """

    B: Tensor

    def __init__(self, d: int, classes: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(d, classes, generator=generator) / classes**0.5)

    def readout(self, p: Tensor) -> Tensor:
        return p @ self.B

    def project(self, e: Tensor) -> Tensor:
        return e @ self.B.mT

    def directions(self) -> Tensor:
        return self.B


class StructuredFeedback(Feedback):
    """``B = B_U diag(B_s) B_V^T`` with orthonormal ``B_U`` (d, k), ``B_V`` (C, k), k <= min(d, C).

    With ``learn`` the factors are parameters, trained by the unit's own loss.
    """

    orthonormal = True  #: ``U`` and ``V`` are kept orthonormal

    U: Tensor
    s: Tensor
    V: Tensor

    def __init__(
        self, d: int, classes: int, *, rank: int | None, learn: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        k = min(d, classes) if rank is None else min(rank, d, classes)
        U = qr_retract(torch.randn(d, k, generator=generator))
        V = qr_retract(torch.randn(classes, k, generator=generator))
        for name, value in (("U", U), ("s", torch.ones(k)), ("V", V)):
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def readout(self, p: Tensor) -> Tensor:
        return ((p @ self.U) * self.s) @ self.V.mT

    def project(self, e: Tensor) -> Tensor:
        return ((e @ self.V) * self.s) @ self.U.mT

    def directions(self) -> Tensor:
        return self.U
