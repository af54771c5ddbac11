"""The terms of the composite loss in numpy, written out as loops over their definitions."""

from __future__ import annotations

import numpy as np


def orthogonality(*factors: np.ndarray) -> float:
    total = 0.0
    for X in factors:
        for i in range(X.shape[1]):
            for j in range(X.shape[1]):
                total += (float(X[:, i] @ X[:, j]) - (i == j)) ** 2
    return total


def orthonormal_basis(M: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """Of the column space, as many columns as it has dimensions."""
    U, s, _ = np.linalg.svd(M, full_matrices=False)
    return U[:, s > tolerance * s[0]]


def share(output: np.ndarray, feedback: np.ndarray) -> float:
    """Mean squared distance of the feedback's unit directions from the output space."""
    P, Q = orthonormal_basis(output), orthonormal_basis(feedback)
    outside = Q - P @ (P.T @ Q)
    return float((outside**2).sum() / Q.shape[1])


def statistics(h: np.ndarray) -> np.ndarray:
    """Per sample and channel, the standard deviation over space, the mean over tokens; the
    activation without either."""
    if h.ndim == 4 and h.shape[2] * h.shape[3] > 1:
        return np.array([[np.std(channel) for channel in sample] for sample in h])
    if h.ndim == 3:
        return np.array([[np.mean(column) for column in sample.T] for sample in h])
    return h.reshape(len(h), -1)


def similarity(rows: np.ndarray) -> np.ndarray:
    n = len(rows)
    S = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            a, b = rows[i] - rows[i].mean(), rows[j] - rows[j].mean()
            S[i, j] = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return S


def similarity_alignment(h: np.ndarray, targets: np.ndarray) -> float:
    return float(((similarity(statistics(h)) - similarity(targets)) ** 2).mean())


def cosine_alignment(p: np.ndarray, b: np.ndarray) -> float:
    cosines = [
        x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(p, b, strict=True)
    ]  # fmt: skip
    return float(1.0 - np.mean(cosines))
