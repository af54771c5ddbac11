"""The terms of a unit's loss ``L = L_task + alpha L_align + beta L_ortho``: pure functions.

All return 0-dim tensors and are differentiable in every floating argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._map_statistics import accumulation_dtype, spread

__all__ = [
    "channel_statistics",
    "cosine_alignment",
    "hoyer_sparsity",
    "orthogonality_penalty",
    "similarity_alignment",
    "similarity_matrix",
    "statistics_alignment",
    "subspace_share",
]


def orthogonality_penalty(*factors: Tensor) -> Tensor:
    """``sum ||X^T X - I||_F^2`` over ``factors``, each (m, r). Zero when all are orthonormal."""
    total = factors[0].new_zeros(())
    for X in factors:
        gram = X.mT @ X
        total = (
            total + (gram - torch.eye(gram.shape[0], dtype=X.dtype, device=X.device)).square().sum()
        )
    return total


def subspace_share(output: Tensor, feedback: Tensor) -> Tensor:
    """``1 - ||P Q||_F^2 / k``: the share of the feedback that the layer's output cannot receive.

    ``output``: (N, q), columns spanning the layer's reachable output directions, ``P`` the
    projector onto them. ``feedback``: (N, f) of full rank, columns spanning the feedback's
    directions in the same space, ``Q`` (N, k) an orthonormal basis of them. In [0, 1]; 0 where
    ``span Q`` lies in the layer's output space, so always where ``q >= N``. Computed in at least
    single precision (torch decomposes no half-precision matrices), returned in ``output``'s.
    """
    N, q = output.shape
    if q >= N:
        return output.new_zeros(())
    basis = torch.linalg.qr(output.to(accumulation_dtype(output.dtype))).Q
    feedback = feedback.to(basis.dtype)
    Q = torch.linalg.qr(feedback).Q if feedback.shape[1] <= N else _leading_basis(feedback)
    received: Tensor = (basis.mT @ Q).square().sum() / Q.shape[1]
    return (1.0 - received).to(output.dtype)


def _leading_basis(M: Tensor) -> Tensor:
    """Orthonormal basis (N, N) of the column space of a wide matrix."""
    U: Tensor = torch.linalg.svd(M, full_matrices=False).U
    return U


def channel_statistics(h: Tensor) -> Tensor:
    """What similarity compares, (B, d): the per-channel spatial standard deviation of a map
    (B, C, h, w), or the activation itself where there is no space, flattened per sample.

    Tokens (B, T, d) are averaged, as their feedback is: better than their spread on two small
    transformers. A map of a single position has no spread; its activation stands for itself.

    In at least single precision, whatever autocast hands on.
    """
    if h.ndim == 4 and h.shape[2] * h.shape[3] > 1:
        return spread(h)
    if h.ndim == 3:
        return h.mean(1, dtype=accumulation_dtype(h.dtype))
    return h.flatten(1).to(accumulation_dtype(h.dtype))


def similarity_matrix(x: Tensor) -> Tensor:
    """``S_ij = cos(x_i - mean(x_i), x_j - mean(x_j))`` for ``x`` (B, d); (B, B). It is 0, and so is
    its gradient, where a row is constant, as that of a blank image can be."""
    directions, _ = _directions(x)
    return directions @ directions.mT


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``x_i - mean(x_i)`` of norm 1, (B, d), and which there are, (B, 1); the others are 0.

    A row has a direction unless it is constant to rounding, or its norm is below a thousandth of
    the batch's: the gradient of a cosine grows as one over the norm, and one such sample would
    outweigh all others.
    """
    rounding = (100 * torch.finfo(x.dtype).eps * x.detach()).square().sum(dim=1, keepdim=True)
    return _unit(x - x.mean(dim=1, keepdim=True), rounding)


def _unit(x: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` (..., d) of norm 1, or 0 where the norm's square is below ``rounding`` or a
    millionth of the mean; and where it is not, (..., 1)."""
    squares = x.square().sum(dim=-1, keepdim=True)
    there = squares.detach() > torch.maximum(1e-6 * squares.detach().mean(), rounding)
    return x * (there / squares.where(there, 1.0).sqrt()), there


def similarity_alignment(h: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference between the batch's similarity matrix of activations and of targets.
    Pairs of which one similarity is not defined, as of a blank image, count as no difference.

    ``h``: a unit's output (B, ...); ``targets``: (B, C), one-hot labels or real targets.
    Source: Noekland and Eidnes, *Training Neural Networks with Local Error Signals* (2019), eq. 1.
    """
    return statistics_alignment(channel_statistics(h), targets)


def statistics_alignment(statistics: Tensor, targets: Tensor) -> Tensor:
    """:func:`similarity_alignment` of activations whose :func:`channel_statistics` (B, d) are at
    hand."""
    found, there = _directions(statistics)
    wanted, wanted_there = _directions(targets.to(statistics.dtype))
    found, wanted = found * wanted_there, wanted * there
    return F.mse_loss(found @ found.mT, wanted @ wanted.mT)


def cosine_alignment(pooled: Tensor, directions: Tensor) -> Tensor:
    """``1 - mean_i cos(p_i, b_i)``: pooled activation against feedback direction, both (B, d).
    A cosine counts as 0, and so does its gradient, where one of the two is 0."""
    p, _ = _unit(pooled, pooled.new_zeros(()))
    return 1.0 - (p * F.normalize(directions, dim=-1)).sum(dim=-1).mean()


def hoyer_sparsity(s: Tensor) -> Tensor:
    """Hoyer's sparsity measure ``||s||_1 / ||s||_2``, in [1, sqrt(r)]: small where few values carry
    the energy. Scale-free, so that it shapes the spectrum without shrinking the weight."""
    ratio: Tensor = torch.linalg.vector_norm(s, 1) / torch.linalg.vector_norm(s).clamp_min(1e-12)
    return ratio
