"""The exact SVD of a product ``U diag(s) V^T``, and what it does to gradients and optimizer state.

**Re-diagonalisation.** With QR decompositions ``U = Q_U R_U``, ``V = Q_V R_V`` and the SVD of the
small core ``R_U diag(s) R_V^T = A diag(s') B^T``, the factors ``U' = Q_U A``, ``s'``,
``V' = Q_V B`` are the SVD of the same matrix ``W``. Where ``U`` and ``V`` are orthonormal to
rounding, as a retraction leaves them, ``U diag(s) V^T`` is that SVD already, up to the order and
the signs of its columns: nothing is turned, and cutting means dropping columns.

**Gradients.** Let ``G = dL/dW``, ``P = R_U^T A`` and ``Q = R_V^T B`` (r, r). Then
``dL/dU' = G V' diag(s') = (G V diag(s)) P = dL/dU P`` and ``dL/dV' = dL/dV Q`` exactly, whatever
the factors, and ``s' = (P o Q)^T s`` with ``o`` the elementwise product. Sums of gradients
(momentum) are carried by the same maps; ``dL/ds' = (P o Q)^T dL/ds`` holds exactly where ``P`` and
``Q`` are signed permutations, and otherwise leaves out what only the off-diagonal of ``U^T G V``
knows.

**Next step.** From orthonormal ``U``, ``V`` the change is a permutation of columns with signs, so
every elementwise optimizer (SGD with any momentum, Adam and its kin) takes the step it would have
taken. From other factors the gradient step of (U, s, V) itself depends on the factorisation: that
of ``U`` moves ``W`` by ``-lr G V diag(s)^2 V^T`` before, by ``-lr G V' diag(s')^2 V'^T`` after, and
these differ by as much as ``U^T U`` differs from the identity. No treatment of the state can undo
that.

**Second moments** become ``v'_k = sum_i P_ik^2 v_i``: exact for signed permutations. In general the
true second moment of ``g P`` lies between 0 and ``r`` times this (Cauchy-Schwarz), and is this
where the columns of ``g`` are uncorrelated. For orthonormal ``P`` each row keeps its sum.

**Copies of the weights**, as schedule-free optimizers keep them, are turned like the weights:
``U' = U P^-T``, ``V' = V Q^-T``, ``s' = (P o Q)^T s``. So means of copies stay their means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import FactoredLayer
from .stiefel import orthogonality_error


class Rediagonalized(NamedTuple):
    """The SVD ``U diag(s) V^T`` of a product, in double precision, and the maps ``P``, ``Q`` (r, r)
    that carry gradients from the old factors to these."""

    U: Tensor
    s: Tensor
    V: Tensor
    P: Tensor
    Q: Tensor


def rediagonalize(U: Tensor, s: Tensor, V: Tensor) -> Rediagonalized:
    """Exact SVD of ``U diag(s) V^T``, ``U`` (m, r), ``s`` (r,), ``V`` (n, r), without forming it.

    Singular values come out non-negative and falling. The maps are those of the module's text.
    """
    Q_U, R_U = torch.linalg.qr(U.detach().double())
    Q_V, R_V = torch.linalg.qr(V.detach().double())
    A, sigma, Bt = torch.linalg.svd((R_U * s.detach().double()) @ R_V.mT)
    return Rediagonalized(Q_U @ A, sigma, Q_V @ Bt.mT, R_U.mT @ A, R_V.mT @ Bt.mT)


def energy_rank(s: Tensor, energy: float) -> int:
    """The smallest number of entries of ``s`` (r,) with ``energy`` of all their squares' sum."""
    squares = s.detach().double().square().sort(descending=True).values
    sums = squares.cumsum(0)
    # An ulp of the sum is no energy: it must not cost a direction, nor at energy=1 keep a null one.
    enough = sums >= sums[-1] * energy * (1 - 4 * torch.finfo(torch.float64).eps)
    return int(enough.int().argmax()) + 1


def spectrum(layer: FactoredLayer) -> Tensor:
    """Singular values of the layer's matrix, (r,), falling, in double precision."""
    return rediagonalize(layer.U, layer.s, layer.V).s


def rediagonalized(layer: FactoredLayer) -> Rediagonalized | None:
    """The layer's SVD, or None where its factors are that already, to rounding."""
    error = max(orthogonality_error(X.detach().double()).item() for X in (layer.U, layer.V))
    if error <= 32 * torch.finfo(layer.U.dtype).eps * math.sqrt(layer.rank):
        return None
    return rediagonalize(layer.U, layer.s, layer.V)
