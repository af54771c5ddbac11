"""The Stiefel manifold in numpy, by other routes than the library's."""

from __future__ import annotations

import numpy as np


def polar(X: np.ndarray) -> np.ndarray:
    """``X (X^T X)^(-1/2)`` through the eigenvalues of the Gram matrix."""
    values, vectors = np.linalg.eigh(X.T @ X)
    return X @ (vectors / np.sqrt(values)) @ vectors.T


def gram_schmidt(X: np.ndarray) -> np.ndarray:
    """Columns made orthonormal one after the other, twice over for rounding's sake."""
    Q = np.zeros_like(X)
    for j in range(X.shape[1]):
        v = X[:, j].copy()
        for _ in range(2):
            v -= Q[:, :j] @ (Q[:, :j].T @ v)
        Q[:, j] = v / np.linalg.norm(v)
    return Q


def nearly_polar(X: np.ndarray) -> np.ndarray:
    """What five steps of ``a X + b X X^T X + c (X X^T)^2 X`` from ``X / ||X||_F`` come to: the same
    polynomial of each singular value."""
    A, sigma, Bt = np.linalg.svd(X, full_matrices=False)
    sigma = sigma / np.linalg.norm(sigma)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return (A * sigma) @ Bt


def tangent_basis(X: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the tangent space at ``X`` (m, r), as rows of (dim, m r).

    Tangent vectors are ``X A + X_perp K`` with ``A`` skew: each entry of ``A`` and ``K`` in turn.
    """
    m, r = X.shape
    complement = np.linalg.svd(X, full_matrices=True)[0][:, r:]
    rows = []
    for i in range(r):
        for j in range(i):
            A = np.zeros((r, r))
            A[i, j], A[j, i] = 1.0, -1.0
            rows.append((X @ A).ravel() / np.sqrt(2.0))
    for i in range(m - r):
        for j in range(r):
            K = np.zeros((m - r, r))
            K[i, j] = 1.0
            rows.append((complement @ K).ravel())
    return np.array(rows).reshape(-1, m * r)
