"""The terms of a unit's loss ``L = L_task + alpha L_align + beta L_ortho``: pure functions.

All return 0-dim tensors and are differentiable in every floating argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._map_statistics import accumulation_dtype, spread, token_mean


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
    if feedback.shape[1] <= N:
        Q = torch.linalg.qr(feedback).Q
    else:
        Q = torch.linalg.svd(feedback, full_matrices=False).U
    received: Tensor = (basis.mT @ Q).square().sum() / Q.shape[1]
    return (1.0 - received).to(output.dtype)


def channel_statistics(h: Tensor) -> Tensor:
    """The statistics (B, d) that similarity alignment compares, in at least single precision.

    For a map (B, C, h, w) the standard deviation of each channel over space; for tokens (B, T, d)
    their mean, which on two small transformers was better than their deviation; else, and for a map
    of one position, the activations themselves, flattened per sample.
    """
    if h.ndim == 4 and h.shape[2] * h.shape[3] > 1:
        return spread(h)
    if h.ndim == 3:
        return token_mean(h, accumulation_dtype(h.dtype))
    return h.flatten(1).to(accumulation_dtype(h.dtype))


class Directions(NamedTuple):
    """Vectors ``rows`` (B, d) of norm 1, or 0 where a sample has no direction; ``there`` (B, 1):
    which have one."""

    rows: Tensor
    there: Tensor


def directions(x: Tensor) -> Directions:
    """Rows ``x_i - mean(x_i)`` of ``x`` (B, d), scaled to norm 1; 0 for rows without a direction.

    A row has none if it is constant to rounding, or if its norm is below a thousandth of the
    batch's: the gradient of a cosine grows as one over the norm, and one such sample would outweigh
    all others.
    """
    mean = x.mean(dim=1, keepdim=True)
    centred = x - mean
    scale, there = _scale(centred, mean)
    return Directions(centred * scale, there)


def _scale(x: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors (..., 1) that scale the rows of ``x`` (..., d) to norm 1, and which rows have a
    direction. A row has none, and the factor 0, if its squared norm is below a millionth of the
    batch's mean, or if the subtraction of ``mean`` may have left rounding alone."""
    squares = x.square().sum(dim=-1, keepdim=True)
    known = squares.detach()
    least = 1e-6 * known.mean()
    if mean is not None:
        before = known + x.shape[-1] * mean.detach().square()
        least = torch.maximum(least, (100 * torch.finfo(x.dtype).eps) ** 2 * before)
    there = known > least
    return there / squares.where(there, 1.0).sqrt(), there


def similarity_alignment(h: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference between the batch's similarity matrix of activations and of targets.
    A pair whose similarity is not defined, such as that of a blank image, counts as no difference.

    ``h``: a unit's output (B, ...); ``targets``: (B, C), one-hot labels or real targets.
    Source: Noekland and Eidnes, *Training Neural Networks with Local Error Signals* (2019), eq. 1.
    """
    statistics = channel_statistics(h)
    return statistics_alignment(statistics, directions(targets.to(statistics.dtype)))


def statistics_alignment(statistics: Tensor, wanted: Directions) -> Tensor:
    """:func:`similarity_alignment` from the :func:`channel_statistics` (B, d) of the activations
    and the :func:`directions` of the targets."""
    return cast(Tensor, _Alignment.apply(statistics, *wanted))  # type: ignore[no-untyped-call]


class _Alignment(torch.autograd.Function):
    """The gradient, in closed form, is computed together with the value: autograd would take five
    times as many operations, and their number decides the time that small batches take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Tensor, wanted_there: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        centred = x - mean
        scale, there = _scale(centred, mean)
        found, wanted = centred * (scale * wanted_there), wanted * there
        difference = torch.addmm(wanted @ wanted.mT, found, found.mT, beta=-1)
        slope = difference * (4 / difference.numel())
        d_x = d_wanted = None
        if ctx.needs_input_grad[0]:
            d_found = slope @ found
            d_x = (d_found - found * (found * d_found).sum(1, keepdim=True)) * scale * wanted_there
            d_x -= d_x.mean(dim=1, keepdim=True)
        if ctx.needs_input_grad[1]:
            d_wanted = slope.neg() @ wanted * there
        ctx.save_for_backward(d_x, d_wanted)
        return difference.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else grad * d for d in ctx.saved_tensors), None


def cosine_alignment(pooled: Tensor, directions: Tensor) -> Tensor:
    """``1 - mean_i cos(p_i, b_i)``: pooled activation against feedback direction, both (B, d).
    A cosine counts as 0, and so does its gradient, where one of the two is 0."""
    scale, _ = _scale(pooled)
    return 1.0 - (pooled * scale * F.normalize(directions, dim=-1)).sum(dim=-1).mean()


def hoyer_sparsity(s: Tensor) -> Tensor:
    """Hoyer's sparsity measure ``||s||_1 / ||s||_2``, in [1, sqrt(r)]: small where few values carry
    the energy. Scale-free, so that it shapes the spectrum without shrinking the weight."""
    ratio: Tensor = torch.linalg.vector_norm(s, 1) / torch.linalg.vector_norm(s).clamp_min(1e-12)
    return ratio
