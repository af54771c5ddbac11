"""A factored convolution fused with the batch norm, activation and pooling that follow it.

In the channel scheme a convolution ends in ``y = W z + b``, where ``z`` (B, r, h, w) has only ``r``
channels and ``W = U diag(s)`` is (N, r). Two things follow, and both are exact:

- The batch statistics of ``y`` that a norm needs follow from those of ``z``: the mean is
  ``W mean(z) + b``, the variance ``diag(W cov(z) W^T)``. So the norm becomes a change of ``W`` and
  ``b``, and the map of ``N`` channels that it would read need not exist.
- What is left, ``W z + b``, activation and pooling, treats every sample by itself. So it can be
  computed for some samples at a time, and again in the backward pass (:mod:`._kernels`). Only ``z``
  is saved; where the output of a ReLU is pooled, also the pooled map and the positions of the
  maxima.

So a training step keeps ``r`` channels at full resolution in place of ``2 N`` to ``3 N``.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import outside_autocast
from .._map_statistics import accumulation_dtype
from ._kernels import expand, moments, reduce
from .layers import FactoredLayer, SVDConv2d

Kernel = Literal["fused", "factored", "merged"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


class FusedConv2d(SVDConv2d):
    """``layer``, a factored convolution, and ``tail``, the modules that follow it.

    It has the parameters of ``layer`` itself, not copies. In evaluation it runs ``layer`` and then
    ``tail``; for training see the text of the module. Input (B, C, h, w).

    ``read_by_parts``: only another fused convolution reads the output, which need not be stored
    then. ``kernel``: how a training step is computed; the function is always the same. ``"fused"``
    takes the least memory; ``"factored"`` runs ``layer`` and then ``tail``; ``"merged"`` forms
    ``W = U diag(s) V^T`` once a step and runs the dense convolution, the fastest on small maps and
    at high ranks.
    """

    affine = False
    tail: nn.Sequential

    def __init__(self, layer: SVDConv2d, tail: list[nn.Module]) -> None:
        U, s, V = (t.to("meta") for t in (layer.U, layer.s, layer.V))  # no copies of the values
        super().__init__(U, s, V, None, like=cast(Any, layer), scheme=layer.scheme)
        take_over(self, layer, tail)
        self.read_by_parts = False
        self.kernel: Kernel = "fused"

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "merged" and self.training:
            y = F.conv2d(
                x, self.merged_weight(), self.bias, self.stride, self.padding, self.dilation
            )
            return cast(Tensor, self.tail(y))
        if self.kernel == "factored" or not self.training:
            return cast(Tensor, self.tail(super().forward(x)))
        z, second, tail = reduce(self, x), self.expansion(), list(self.tail)
        bias: Tensor | None = self.bias
        if isinstance(norm := tail[0], nn.BatchNorm2d):
            kernel, bias = _norm(norm, z, second[:, :, 0, 0], bias)
            second, tail = kernel[:, :, None, None], tail[1:]
        return expand(self, z, second, bias, tail, lazy=self.read_by_parts)

    def plain(self) -> nn.Module:
        return nn.Sequential(super().plain(), *self.tail)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


def take_over(fused: FactoredLayer, layer: FactoredLayer, tail: list[nn.Module]) -> None:
    """Give ``fused`` the mode of ``layer``, its parameters, the same objects, so that frozen ones
    stay frozen, and as ``tail`` the modules that follow it, which keep their own mode."""
    for name in ("U", "s", "V", "bias"):
        fused.register_parameter(name, layer._parameters[name])
    fused.tail = nn.Sequential(*tail)
    fused.training = layer.training


def _norm(norm: nn.BatchNorm2d, z: Tensor, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (N, r) and bias (N,) that give for ``z`` what ``norm`` gives for ``W z + bias``.
    Computed in at least single precision, returned in the dtype of ``W``.

    Updates the running statistics of ``norm`` as its own forward pass would.
    """
    dtype, W = W.dtype, W.to(accumulation_dtype(W.dtype))
    shift = W.new_zeros(len(W)) if bias is None else bias
    if norm.training or norm.running_mean is None:
        count = z.numel() // z.shape[1]
        if count <= 1:
            raise ValueError(
                "batch norm needs more than one value per channel in training, "
                f"got a map of shape {tuple(z.shape)}"
            )
        with outside_autocast():  # rounding would spoil small variances
            mean_z, cov_z = moments(z)
            centre = W @ mean_z
            variance = ((W @ cov_z) * W).sum(1).clamp_min(0.0)
        if norm.training and norm.running_mean is not None:
            _update_statistics(norm, (centre + shift).detach(), variance.detach(), count)
        offset = centre + 0.0 * shift  # a bias before a norm has no effect; its gradient is zero
    else:
        assert norm.running_var is not None
        offset, variance = norm.running_mean - shift, norm.running_var.to(W.dtype)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    start = 0.0 if norm.bias is None else norm.bias
    return (W * scale[:, None]).to(dtype), (start - scale * offset).to(dtype)


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share: float | Tensor = (
        1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    )
    norm.running_mean += share * (mean - norm.running_mean)
    norm.running_var += share * (variance * (count / (count - 1)) - norm.running_var)
