"""The Stiefel manifold St(m, r) = {X in R^(m x r) : X^T X = I}: pure functions on plain tensors.

Every function takes matrices of shape ``(..., m, r)`` with ``m >= r`` and returns new tensors.
Reference: Absil, Mahony and Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008),
chapter 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def _check_tall(X: Tensor) -> None:
    if X.ndim < 2 or X.shape[-2] < X.shape[-1]:
        raise ValueError(f"X must have shape (..., m, r) with m >= r, got {tuple(X.shape)}")


def _in_single_precision(retract: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``retract`` computed in at least single precision, as torch decomposes no half-precision
    matrices, and returned in the dtype of its argument."""

    @functools.wraps(retract)
    def in_single_precision(X: Tensor) -> Tensor:
        return retract(X.to(torch.promote_types(X.dtype, torch.float32))).to(X.dtype)

    return in_single_precision


@_in_single_precision
def qr_retract(X: Tensor) -> Tensor:
    """Q of the QR decomposition of ``X`` with the diagonal of R made positive, ``(..., m, r)``.

    The sign convention makes the result unique and continuous: a matrix with orthonormal columns
    is returned as it is. On the CPU it is computed from the Cholesky factor of ``X^T X`` where that
    is accurate, as it is near the manifold; that takes a third of the time.
    """
    _check_tall(X)
    if (X.is_cpu or X.is_meta) and (Q := _cholesky_q(X)) is not None:
        return Q
    Q, R = torch.linalg.qr(X)
    signs: Tensor = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(X.dtype)
    result: Tensor = Q * signs.unsqueeze(-2)
    return result.contiguous()


def _cholesky_q(X: Tensor) -> Tensor | None:
    """Q of the QR decomposition of ``X`` as ``X L^-T``, ``L`` the Cholesky factor of ``X^T X``;
    None where that loses digits. Deciding reads a value, which would stall another device."""
    L, failed = torch.linalg.cholesky_ex(X.mT @ X)
    Q = torch.linalg.solve_triangular(L, X.mT, upper=False).mT
    # The accuracy of Householder's QR. If X is close to a lower rank, the error is larger, or NaN.
    bound = 4 * torch.finfo(X.dtype).eps * X.shape[-1] ** 0.5
    accurate = (orthogonality_error(Q) <= bound).logical_and_(failed == 0).all()
    return Q.contiguous() if X.is_meta or accurate else None  # of meta tensors: as on the CPU


@_in_single_precision
def polar_retract(X: Tensor) -> Tensor:
    """The orthonormal polar factor of ``X``: the nearest point of St(m, r) in Frobenius norm.

    Through the thin SVD ``X = A S B^T``: the factor is ``A B^T``, shape ``(..., m, r)``. NaN
    where ``X`` has an entry that is not finite.
    """
    _check_tall(X)
    # On some devices the SVD of values that are not finite raises, which would end a training run.
    finite = X.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    A, _, Bt = torch.linalg.svd(X.where(finite, 0.0), full_matrices=False)
    result: Tensor = (A @ Bt).where(finite, torch.nan)
    return result


def newton_schulz_retract(X: Tensor, steps: int = 2) -> Tensor:
    """The polar factor by Newton-Schulz iteration ``X <- X (3I - X^T X) / 2``: products only.

    Converges quadratically from ``||X^T X - I||_2 < 1``, where an error of ``eps`` becomes
    ``3/4 eps^2`` per step. That is where a small update leaves an orthonormal matrix. From
    ``||X^T X - I||_2 >= 2`` the iteration would diverge: there, and somewhat before, ``X`` is first
    divided by a bound of its norm, which leaves the polar factor what it is. A few steps then come
    closer to it, not all the way: for large updates use :func:`polar_retract`.
    """
    _check_tall(X)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    E = _gram_defect(X)
    bound = torch.linalg.matrix_norm(E @ E, keepdim=True).sqrt()  # of the spectral norm of E
    scale = torch.where(bound > 1.7, (1.0 + bound).rsqrt(), 1.0).to(X.dtype)
    X = X * scale
    for _ in range(steps):
        X = X - 0.5 * X @ _gram_defect(X)
    return X


#: Of a x + b x^3 + c x^5, which takes small x away from 0 fast (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


@_in_single_precision
def orthogonalize(X: Tensor) -> Tensor:
    """Roughly the orthonormal polar factor of ``X`` (..., m, n), of any shape: products only.

    Singular vectors stay, singular values are brought near 1: into [0.68, 1.21] those that were at
    least 1/500 of ``||X||_F``, smaller ones grow by the same factor of about 500. Zero stays zero.
    The iteration of Jordan et al., *Muon* (2024), on the smaller Gram matrix alone, so that a tall
    ``X`` costs two products.
    """
    if X.shape[-2] < X.shape[-1]:
        return orthogonalize(X.mT).mT
    a, b, c = _QUINTIC
    norm = torch.linalg.matrix_norm(X, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    X = X / norm
    gram = X.mT @ X
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    product = eye
    for _ in range(5):
        factor = a * eye + b * gram + c * (gram @ gram)  # commutes with gram
        product = product @ factor
        gram = factor @ gram @ factor
    return X @ product


def orthogonality_error(X: Tensor) -> Tensor:
    """``||X^T X - I||_F``, shape ``(...)``. Zero exactly on the manifold."""
    _check_tall(X)
    error: Tensor = torch.linalg.matrix_norm(_gram_defect(X))
    return error


def _gram_defect(X: Tensor) -> Tensor:
    """``X^T X - I``, shape (..., r, r)."""
    gram = X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram


RETRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "qr": qr_retract,
    "polar": polar_retract,
    "newton-schulz": newton_schulz_retract,
}
