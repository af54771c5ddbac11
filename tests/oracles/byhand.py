"""Backward passes of feedback alignment on a multi-layer perceptron, written out in numpy.

Layers are ``(W, b)`` with ``W`` (out, in); all but the last are followed by a ReLU. The loss is the
mean cross-entropy of the last layer's output. Gradients come as ``(dW, db)``, layer by layer.
"""

from __future__ import annotations

import numpy as np

Layer = tuple[np.ndarray, np.ndarray]


def forward(x: np.ndarray, layers: list[Layer]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs of the layers and their outputs before the ReLU."""
    inputs, sums = [], []
    for i, (W, b) in enumerate(layers):
        inputs.append(x)
        sums.append(x @ W.T + b)
        x = np.maximum(sums[-1], 0.0) if i + 1 < len(layers) else sums[-1]
    return inputs, sums


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[y]


def output_error(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p - one_hot(y, z.shape[1])) / len(y)


def _gradients(inputs: list[np.ndarray], deltas: list[np.ndarray]) -> list[Layer]:
    return [(d.T @ a, d.sum(0)) for a, d in zip(inputs, deltas, strict=True)]


def dfa(x: np.ndarray, y: np.ndarray, layers: list[Layer], B: list[np.ndarray]) -> list[Layer]:
    """Noekland (2016): delta_l = (B_l e) * f'(a_l); the last layer gets e itself."""
    inputs, sums = forward(x, layers)
    e = output_error(sums[-1], y)
    deltas = [(e @ matrix.T) * (a > 0) for matrix, a in zip(B, sums[:-1], strict=True)]
    return _gradients(inputs, [*deltas, e])


def drtp(x: np.ndarray, y: np.ndarray, layers: list[Layer], B: list[np.ndarray]) -> list[Layer]:
    """Frenkel et al. (2021): -y (a mean over the batch) for e below the last layer."""
    inputs, sums = forward(x, layers)
    target = -one_hot(y, sums[-1].shape[1]) / len(y)
    deltas = [(target @ matrix.T) * (a > 0) for matrix, a in zip(B, sums[:-1], strict=True)]
    return _gradients(inputs, [*deltas, output_error(sums[-1], y)])


def fa(x: np.ndarray, y: np.ndarray, layers: list[Layer], back: list[np.ndarray]) -> list[Layer]:
    """Lillicrap et al. (2016): delta_l = (M_{l+1}^T delta_{l+1}) * f'(a_l), M of W's shape."""
    inputs, sums = forward(x, layers)
    deltas = [output_error(sums[-1], y)]
    for i in range(len(layers) - 2, -1, -1):
        deltas.insert(0, (deltas[0] @ back[i + 1]) * (sums[i] > 0))
    return _gradients(inputs, deltas)


def ssa_local(
    x: np.ndarray, y: np.ndarray, layers: list[Layer], B: list[np.ndarray]
) -> tuple[list[Layer], list[np.ndarray]]:
    """The local error e_l = softmax(B_l^T h_l) - y at horizon 0, and the gradient of each B_l."""
    inputs, sums = forward(x, layers)
    deltas, learned = [], []
    for matrix, a in zip(B, sums[:-1], strict=True):
        h = np.maximum(a, 0.0)
        e = output_error(h @ matrix, y)
        deltas.append((e @ matrix.T) * (a > 0))
        learned.append(h.T @ e)
    return _gradients(inputs, [*deltas, output_error(sums[-1], y)]), learned


def turned(p: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Gradient of ``1 - mean_i cos(p_i, b_i)`` in ``p``, row by row."""
    found = np.zeros_like(p)
    for i, (u, v) in enumerate(zip(p, b, strict=True)):
        lengths = np.linalg.norm(u) * np.linalg.norm(v)
        cosine = u @ v / lengths
        found[i] = (cosine * u / (u @ u) - v / lengths) / len(p)
    return found


def ssa_reconstruction(
    x: np.ndarray,
    y: np.ndarray,
    layers: list[Layer],
    B: list[np.ndarray],
    alpha: float,
    towards: str,
) -> list[Layer]:
    """delta_l = (B_l e + alpha d/dh (1 - mean cos(h, B_l w))) * f'(a_l), w being e, -e or y."""
    inputs, sums = forward(x, layers)
    e = output_error(sums[-1], y)
    w = {"with-error": e, "against-error": -e, "target": one_hot(y, e.shape[1])}[towards]
    deltas = [
        (e @ matrix.T + alpha * turned(np.maximum(a, 0.0), w @ matrix.T)) * (a > 0)
        for matrix, a in zip(B, sums[:-1], strict=True)
    ]
    return _gradients(inputs, [*deltas, e])


def in_factors(
    G: np.ndarray, U: np.ndarray, s: np.ndarray, V: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The dense gradient ``G`` of ``U diag(s) V^T`` as gradients of ``U``, ``s`` and ``V``."""
    return G @ V * s, np.diag(U.T @ G @ V).copy(), G.T @ U * s
